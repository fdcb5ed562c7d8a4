"""How the five kernels of mamba3_chunk_scan are launched."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import INTERPRETED, cdiv, on_device_of, or_placeholder, slots_of
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.limits import Limits
from mamba_ops.ops.mamba3_chunk_scan.triton.chunks import _begin, _rotate, _turns, _weigh
from mamba_ops.ops.mamba3_chunk_scan.triton.scan import _scan

if TYPE_CHECKING:
    from mamba_ops.ops.mamba3_chunk_scan.op import Arguments
CHUNK = 64
"""Tokens of a chunk, whatever the call's own chunks are: results depend on it by rounding alone."""


def mamba3_chunk_scan(call: "Arguments") -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    What matrix units are given is rounded to the common dtype of x, B and C: turned k and q, the state before a chunk,
    the weights with which queries read values, and values times their weights in the state; for float16, whose range is
    too narrow for all but the first two, to as many digits of float32.

    Every token of an activation must be dense, and every parameter: others are copied first, and an output that is not
    is written through a copy. Where a token of x, B, C, z or output or a slot of ssm_state does not start at a multiple
    of 16 bytes, or a slot is not dense, reads are narrow and slow.
    """
    flat = call.cu_seqlens is not None
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    length = None if flat else call.x.shape[1]
    (heads, dim), (groups, dstate), pairs = call.x.shape[-2:], call.B.shape[-2:], call.angles.shape[-1]
    tokens = call.x.numel() // (heads * dim)
    if rows == 0 or (tokens == 0 and (call.write_slots is None or call.ssm_state is None)):
        return

    written = by_token(call.output, flat)
    x, dt, A, trap, angles, B, C = (
        by_token(t, flat) for t in (call.x, call.dt, call.A, call.trap, call.angles, call.B, call.C)
    )
    z = None if call.z is None else by_token(call.z, flat)
    B_bias, C_bias, D = (None if t is None else t.contiguous() for t in (call.B_bias, call.C_bias, call.D))
    cu_seqlens = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    slots, write_slots = (None if t is None else dense(t) for t in (call.slots, call.write_slots))
    common = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    operand = torch.bfloat16 if common == torch.bfloat16 and not INTERPRETED else torch.float32
    # (Triton's interpreter multiplies the bits of bfloat16 numbers.)
    rounds = {"FLOAT16": common == torch.float16}

    launches = _launches(x.get_device(), dim, dstate, str(common).removeprefix("torch."))
    half = launches["_turns"]["HALF"]
    chunks = tokens // CHUNK + rows if length is None else rows * cdiv(length, CHUNK)

    def scratch(dtype: torch.dtype, *sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=x.device)

    turns, starts = (scratch(torch.int64, chunks, heads, half) for _ in range(2))
    keys, queries = (scratch(operand, chunks, heads, CHUNK, dstate) for _ in range(2))
    weights, factors = scratch(operand, chunks, heads, CHUNK, CHUNK), scratch(torch.float32, chunks, heads, 4, CHUNK)
    before = scratch(operand, rows, heads, dstate)
    last_angle, last_k = scratch(torch.float32, rows, heads, pairs), scratch(torch.float32, rows, heads, dstate)

    places = 0
    for tensor in (x, B, C, written, *([] if z is None else [z])):
        places |= tensor.data_ptr() | tensor.stride(0) * tensor.itemsize | tensor.shape[-1] * tensor.itemsize
    given = (call.angle_state, call.ssm_state, call.k_state, call.v_state)
    strides: list[Any] = [(-1, 0, 0, 0)[: 4 if i == 1 else 3] if c is None else c.stride() for i, c in enumerate(given)]
    if call.ssm_state is not None:
        places |= call.ssm_state.data_ptr() | strides[1][0] * call.ssm_state.itemsize
    aligned = places % 16 == 0 and (call.ssm_state is None or is_dense(call.ssm_state))
    usual = (tl.float32, tl.float32, call.x.dtype, call.x.dtype)
    angle_state, ssm_state, k_state, v_state = (
        or_placeholder(cache, x, kind if isinstance(kind, tl.dtype) else _DTYPES[kind])[0]
        for cache, kind in zip(given, usual, strict=True)
    )
    slots, slots_stride = or_placeholder(slots, x, tl.int32)
    write_slots, write_stride = or_placeholder(write_slots, x, tl.int32)
    has_initial_state, initial_stride = or_placeholder(
        None if call.ssm_state is None else call.has_initial_state, x, tl.int1
    )
    of_angle, of_state, of_k, of_v = strides
    size = tokens if length is None else length
    slot_count = slots_of(call.ssm_state)
    with on_device_of(x):
        if tokens:
            _turns[(chunks * heads,)](
                dt,
                angles,
                cu_seqlens,
                turns,
                dt.stride(0),
                angles.stride(0),
                size,
                rows,
                HEADS=heads,
                ANGLES=pairs,
                **launches["_turns"],
            )
            _begin[(rows * heads,)](
                angle_state,
                k_state,
                cu_seqlens,
                slots,
                has_initial_state,
                turns,
                starts,
                before,
                *of_angle,
                *of_k,
                slots_stride,
                initial_stride,
                size,
                call.null_slot,
                slot_count,
                HEADS=heads,
                DSTATE=dstate,
                ANGLES=pairs,
                **rounds,
                **launches["_begin"],
            )
            _rotate[(chunks * heads,)](
                dt,
                angles,
                B,
                C,
                B_bias,
                C_bias,
                cu_seqlens,
                slots,
                starts,
                keys,
                queries,
                last_angle,
                last_k,
                dt.stride(0),
                angles.stride(0),
                B.stride(0),
                C.stride(0),
                slots_stride,
                size,
                rows,
                call.null_slot,
                slot_count,
                HEADS=heads,
                GROUPS=groups,
                DSTATE=dstate,
                ANGLES=pairs,
                ALIGNED=aligned,
                **rounds,
                **launches["_rotate"],
            )
            _weigh[(chunks * heads,)](
                dt,
                A,
                trap,
                cu_seqlens,
                slots,
                keys,
                queries,
                factors,
                weights,
                dt.stride(0),
                A.stride(0),
                trap.stride(0),
                slots_stride,
                size,
                rows,
                call.null_slot,
                slot_count,
                HEADS=heads,
                DSTATE=dstate,
                **launches["_weigh"],
            )
        _scan[(rows * heads * cdiv(dim, launches["_scan"]["BLOCK"]),)](
            x,
            D,
            z,
            cu_seqlens,
            angle_state,
            ssm_state,
            k_state,
            v_state,
            slots,
            write_slots,
            has_initial_state,
            written,
            keys,
            queries,
            factors,
            weights,
            before,
            last_angle,
            last_k,
            x.stride(0),
            None if z is None else z.stride(0),
            written.stride(0),
            slots_stride,
            write_stride,
            initial_stride,
            *(each[0] for each in strides),
            *((None, None, None) if aligned else of_state[1:]),
            *of_angle[1:],
            *of_k[1:],
            *of_v[1:],
            size,
            call.null_slot,
            slot_count,
            HEADS=heads,
            DIM=dim,
            DSTATE=dstate,
            ANGLES=pairs,
            ALIGNED=aligned,
            **launches["_scan"],
        )
    write_back(written, call.output, flat)


_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Of k_state and v_state, where there are none: they have that of x."""


@tunable_launch(
    _turns="num_warps",
    _begin="num_warps",
    _rotate="num_warps",
    _weigh="num_stages",
    _scan="BLOCK num_warps num_stages",
)
def _launches(dim: int, dstate: int, dtype: str, *, limits: Limits) -> Launches:
    """No side of a matrix product is shorter than 16; of float32, than 32. `_weigh` has four warps: with eight, the
    machine code for Hopper reads shared memory at addresses that `tests.descriptors` cannot follow.
    """
    is_wide = dtype != "bfloat16"
    least = 32 if is_wide else 16
    half = max(triton.next_power_of_2(dstate), least) // 2
    block = min(max(triton.next_power_of_2(dim), least), 32)
    shared = {"HALF": half, "CHUNK": CHUNK, "BLOCK_ROWS": 128}
    precision = {"PRECISION": limits.precision(11 if dtype == "float16" else 24) if is_wide else "ieee"}
    read_ahead = 2 * CHUNK * (2 * half + block + CHUNK) * (4 if is_wide else 2)
    stages = 2 if not is_wide and 2 * read_ahead <= limits.shared_memory else 1
    return {
        "_turns": {**shared, "num_warps": 4},
        "_begin": {**shared, "BLOCK_CHUNKS": 32, "num_warps": 4},
        "_rotate": {**shared, "num_warps": 8},
        "_weigh": {**shared, **precision, "num_warps": 4, "num_stages": 1},
        "_scan": {**shared, **precision, "BLOCK": block, "num_warps": 8 if is_wide else 4, "num_stages": stages},
    }
