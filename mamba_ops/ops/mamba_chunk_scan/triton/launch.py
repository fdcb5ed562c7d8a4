"""How the three kernels of mamba_chunk_scan are launched."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import INTERPRETED, cdiv, on_device_of, or_placeholder, slots_of
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import as_float32, by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.limits import Limits
from mamba_ops.ops.mamba_chunk_scan.triton.kernels import _outputs, _prepare, _states

if TYPE_CHECKING:
    from mamba_ops.ops.mamba_chunk_scan.op import Arguments


def mamba_chunk_scan(call: "Arguments") -> None:
    """Write `output`, and the states in place; shapes and meaning are the op's, and are not checked again.

    Matrix products are of the common dtype of x, B and C, and sum in float32; where that is float32, those of another
    dtype are converted first. Every token of an activation must be dense, and every parameter: others are copied first,
    and an output or chunk_states that is not is written through a copy. Where a token of x, B, C, z or output or a slot
    of ssm_state does not start at a multiple of 16 bytes, or a slot is not dense, reads are narrow and slow.
    """
    flat = call.cu_seqlens is not None
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if rows == 0:
        return
    heads, dim, groups, dstate = *call.x.shape[-2:], *call.B.shape[-2:]
    length = None if flat else call.x.shape[1]
    written = by_token(call.output, flat)
    x, dt, B, C = by_token(call.x, flat), by_token(call.dt, flat), by_token(call.B, flat), by_token(call.C, flat)
    z = None if call.z is None else by_token(call.z, flat)
    kept = None if call.chunk_states is None else dense(call.chunk_states)
    A = call.A.contiguous()
    D, dt_bias, cu_seqlens = (None if t is None else t.contiguous() for t in (call.D, call.dt_bias, call.cu_seqlens))

    tokens = x.shape[0]
    chunks = tokens // call.chunk_size + (rows if call.num_computed_tokens is None else 2 * rows)  # at most
    operand = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    if operand == torch.float64 or (operand == torch.bfloat16 and INTERPRETED):
        operand = torch.float32  # Triton's interpreter multiplies the bits of bfloat16 numbers
    x, B, C = as_float32(operand, x, B, C)
    steps = x.new_empty(4, heads, tokens, dtype=torch.float32)
    table = x.new_empty(chunks, 3, dtype=torch.int32)
    first_chunks = x.new_empty(rows, dtype=torch.int32)
    starts = x.new_empty(chunks, heads, dim, dstate, dtype=operand)
    aligned = all(
        t is None or (t.data_ptr() | t.stride(0) * t.itemsize | t.shape[-1] * t.itemsize) % 16 == 0
        for t in (x, B, C, z, written)
    )
    slot_stride, *strides = (-1, 0, 0, 0) if call.ssm_state is None else call.ssm_state.stride()
    if call.ssm_state is not None:
        aligned &= (call.ssm_state.data_ptr() | slot_stride * call.ssm_state.itemsize) % 16 == 0
        aligned &= is_dense(call.ssm_state)
    head_stride, dim_stride, dstate_stride = (None, None, None) if aligned else strides
    slots, slots_stride = or_placeholder(call.slots, x, tl.int32)
    has_initial_state, initial_stride = or_placeholder(
        None if call.ssm_state is None else call.has_initial_state, x, tl.int1
    )
    ssm_state, _ = or_placeholder(call.ssm_state, x, tl.float32)
    num_computed_tokens, computed_stride = or_placeholder(call.num_computed_tokens, x, tl.int32)
    shape = {
        "HEADS": heads,
        "DIM": dim,
        "GROUPS": groups,
        "DSTATE": dstate,
        "CHUNK": call.chunk_size,
        "ALIGNED": aligned,
    }
    launches = _launches(x.get_device(), dim, dstate, call.chunk_size, operand.itemsize)
    prepare, states, outputs = (launches[kernel] for kernel in ("_prepare", "_states", "_outputs"))
    with on_device_of(x):
        _prepare[(chunks, cdiv(heads, prepare["BLOCK_HEADS"]))](
            dt,
            A,
            dt_bias,
            cu_seqlens,
            num_computed_tokens,
            slots,
            has_initial_state,
            steps,
            table,
            first_chunks,
            dt.stride(0),
            slots_stride,
            initial_stride,
            computed_stride,
            tokens if length is None else length,
            rows,
            tokens,
            call.null_slot,
            slots_of(call.ssm_state),
            call.dt_min,
            call.dt_max,
            HEADS=heads,
            CHUNK=call.chunk_size,
            SOFTPLUS=call.dt_softplus,
            **prepare,
        )
        _states[(rows * heads * cdiv(dim, states["BLOCK_DIM"]) * cdiv(dstate, states["BLOCK_STATE"]),)](
            x,
            B,
            cu_seqlens,
            num_computed_tokens,
            slots,
            call.write_slots,
            has_initial_state,
            ssm_state,
            kept,
            steps,
            first_chunks,
            starts,
            x.stride(0),
            B.stride(0),
            slots_stride,
            None if call.write_slots is None else call.write_slots.stride(0),
            initial_stride,
            computed_stride,
            slot_stride,
            head_stride,
            dim_stride,
            dstate_stride,
            None if kept is None else kept.stride(0),
            chunks,
            tokens if length is None else length,
            tokens,
            call.null_slot,
            slots_of(call.ssm_state),
            **shape,
            **states,
        )
        if tokens > 0:
            blocks = cdiv(call.chunk_size, outputs["BLOCK_TOKENS"]) * cdiv(dim, outputs["BLOCK_DIM"])
            _outputs[(chunks * heads * blocks,)](
                x,
                B,
                C,
                D,
                z,
                written,
                steps,
                table,
                starts,
                x.stride(0),
                B.stride(0),
                C.stride(0),
                None if z is None else z.stride(0),
                written.stride(0),
                tokens,
                D_PER_CHANNEL=D is not None and D.dim() == 2,
                **shape,
                **outputs,
            )
    write_back(written, call.output, flat)
    if call.chunk_states is not None and kept is not None and kept.data_ptr() != call.chunk_states.data_ptr():
        call.chunk_states.copy_(kept)


@tunable_launch(
    _prepare="BLOCK_HEADS num_warps",
    _states="BLOCK_DIM BLOCK_STATE BLOCK_TOKENS num_warps num_stages",
    _outputs="BLOCK_DIM BLOCK_TOKENS BLOCK_PAST num_warps num_stages",
)
def _launches(dim: int, dstate: int, chunk_size: int, itemsize: int, *, limits: Limits) -> Launches:
    """No side of a matrix product is shorter than 16."""
    dim, dstate, chunk = (max(triton.next_power_of_2(size), 16) for size in (dim, dstate, chunk_size))
    wide = 64 if itemsize < 4 else 32  # float32 goes without matrix units
    prepare = {"BLOCK_ROWS": 128, "BLOCK_TOKENS": chunk, "BLOCK_HEADS": max(2048 // chunk, 1), "num_warps": 4}
    states = {
        "BLOCK_DIM": min(dim, wide),
        "BLOCK_STATE": min(dstate, wide),
        "BLOCK_TOKENS": min(chunk, wide),
        "num_warps": 4,
        "num_stages": 3,
    }
    outputs = {
        "BLOCK_DIM": min(dim, wide),
        "BLOCK_STATE": dstate,
        "BLOCK_TOKENS": min(chunk, wide),
        "BLOCK_PAST": min(chunk, 32),
        "num_warps": 4,
        "num_stages": 2,
    }
    if limits.is_small:
        states |= {"num_warps": 8, "num_stages": 1}
        outputs |= {"num_warps": 8, "num_stages": 1}
    return {"_prepare": prepare, "_states": states, "_outputs": outputs}
