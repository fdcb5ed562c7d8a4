"""How the two kernels of chunk_gated_delta_rule are launched."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import cdiv, on_device_of, operand_dtype, or_placeholder, slots_of
from mamba_ops.ops._triton.delta_rule import CHUNK, precisions_of
from mamba_ops.ops._triton.gluon import is_hopper_walk, launch_walk
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.limits import Limits
from mamba_ops.ops.chunk_gated_delta_rule.triton.hopper_launch import is_hopper_solve, launch_invert
from mamba_ops.ops.chunk_gated_delta_rule.triton.kernels import _scan, _solve

if TYPE_CHECKING:
    from mamba_ops.ops.chunk_gated_delta_rule.op import Arguments


def chunk_gated_delta_rule(call: "Arguments") -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    What matrix units are given is rounded to the dtype of q, k and v: the state before a chunk, what its tokens find
    missing there, the inverse of its system, how much the queries read of what is written, the product of these two,
    the inverse with what decays until the chunk's end, and what is written as the next chunk finds it; float32 stays
    float32, which is slow. Every token of an activation must be dense: others are copied first, and an output that is
    not is written through a copy. Where a token of q, k, v or output or a slot of the state does not start at a
    multiple of 16 bytes, or a slot is not dense, reads are narrow and slow.
    """
    flat = call.cu_seqlens is not None
    rows = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    length = None if flat else call.v.shape[1]
    (k_heads, k_dim), (v_heads, v_dim) = call.q.shape[-2:], call.v.shape[-2:]
    tokens = call.v.numel() // (v_heads * v_dim)
    moves = call.write_slots is not None and call.ssm_state is not None
    if rows == 0 or (tokens == 0 and not moves):
        return
    chunks = tokens // CHUNK + rows if length is None else rows * cdiv(length, CHUNK)

    written = by_token(call.output, flat)
    q, k, v, g, beta = (by_token(t, flat) for t in (call.q, call.k, call.v, call.g, call.beta))
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    slots, write_slots = (None if t is None else dense(t) for t in (call.slots, call.write_slots))
    operand = operand_dtype(q, k, v)

    factors = torch.empty((chunks, v_heads, 3, CHUNK), dtype=torch.float32, device=v.device)
    solved = torch.empty((chunks, v_heads, 2 * CHUNK, CHUNK), dtype=operand, device=v.device)
    places = 0
    for tensor in (q, k, v, written):
        places |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize | tensor.shape[-1] * tensor.itemsize
    slots, slots_stride = or_placeholder(slots, v, tl.int32)
    has_initial_state, initial_stride = or_placeholder(
        None if call.ssm_state is None else call.has_initial_state, v, tl.int1
    )
    write_slots, write_stride = or_placeholder(write_slots, v, tl.int32)
    slot_stride, *strides = (-1, 0, 0, 0) if call.ssm_state is None else call.ssm_state.stride()
    if call.ssm_state is not None:
        places |= call.ssm_state.data_ptr() | slot_stride * call.ssm_state.itemsize
    aligned = places % 16 == 0 and (call.ssm_state is None or is_dense(call.ssm_state))
    head_stride, value_stride, key_stride = (None, None, None) if aligned else strides
    ssm_state, _ = or_placeholder(call.ssm_state, v, tl.float32)

    sizes = {"K_HEADS": k_heads, "V_HEADS": v_heads, "K_DIM": k_dim, "ALIGNED": aligned, "CHUNK": CHUNK}
    end = tokens if length is None else length
    of_slots = (call.null_slot, slots_of(call.ssm_state))
    launches = _launches(v.get_device(), k_dim, v_dim, str(operand).removeprefix("torch."))
    solve, scan = launches["_solve"], launches["_scan"]
    with on_device_of(v):
        if tokens:
            given = (q, k, g, beta, cu_seqlens, slots, factors, solved)
            scale = k_dim**-0.5 if call.scale is None else float(call.scale)
            found = (scale, *[t.stride(0) for t in (q, k, g, beta)], slots_stride, end, rows, *of_slots)
            if is_hopper_solve(q, k, v, written, aligned=aligned):
                launch_invert(chunks * v_heads, given, found, k_heads, v_heads, call.qk_l2norm)
            else:
                _solve[(chunks * v_heads,)](*given, *found, **sizes, L2NORM=call.qk_l2norm, **solve)
        inputs = (q, k, v, cu_seqlens, ssm_state, slots, write_slots, has_initial_state, written, factors, solved)
        of_tokens = [t.stride(0) for t in (q, k, v, written)]
        of_rows = (slots_stride, write_stride, initial_stride, slot_stride)
        if is_hopper_walk(q, k, v, written, aligned=aligned):
            tensors = (*inputs[:-1], None, solved)
            numbers = (*of_tokens, *of_rows, end, *of_slots)
            launch_walk(rows * v_heads, tensors, numbers, K_HEADS=k_heads, V_HEADS=v_heads, STAGES=3)
        else:
            of_state = (head_stride, value_stride, key_stride)
            grid = (rows * v_heads * cdiv(v_dim, scan["BLOCK"]),)
            _scan[grid](*inputs, *of_tokens, *of_rows, *of_state, end, *of_slots, **sizes, V_DIM=v_dim, **scan)
    write_back(written, call.output, flat)


@tunable_launch(_solve="num_warps num_stages", _scan="BLOCK num_warps num_stages")
def _launches(k_dim: int, v_dim: int, operand: str, *, limits: Limits) -> Launches:
    """What is multiplied in which precision, too; a block of v has a matrix product's shortest side at least.

    On GPUs that multiply what lies in registers, large blocks spill.
    """
    block_k, block_v = (max(triton.next_power_of_2(size), 16) for size in (k_dim, v_dim))
    itemsize = 4 if operand == "float32" else 2
    joined = limits.is_large and itemsize == 2  # so where matrix units read shared memory
    block = min(block_v, 64 if joined else 32)
    read_ahead = (CHUNK * (2 * block_k + block + 2 * CHUNK) + block * block_k) * itemsize
    if joined:  # a step is a chain of products, so loads go two steps ahead
        stages = 3 if 2 * read_ahead <= limits.shared_memory else 2
    else:
        stages = 2 if itemsize == 2 and 4 * read_ahead <= 3 * limits.shared_memory else 1
    precisions = precisions_of(operand, limits)
    solve = {"BLOCK_ROWS": 128, "BLOCK_K": block_k, **precisions, "num_warps": 4}
    solve["SQUARES"] = joined  # where operands take registers, products cost more than sums
    if itemsize == 2:
        solve |= limits.registers(128 if joined else 168)
    scan = {"BLOCK_ROWS": 128, "BLOCK_K": block_k, "BLOCK": block}
    scan |= {"PRECISION": precisions["EXACT"], "JOINED": joined}
    return {"_solve": solve, "_scan": scan | {"num_warps": 8 if joined else 4, "num_stages": stages}}
