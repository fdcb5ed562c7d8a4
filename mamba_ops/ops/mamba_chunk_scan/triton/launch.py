"""How the three kernels of mamba_chunk_scan are launched."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import INTERPRETED, cdiv, on_device_of, operand_dtype, or_placeholder, slots_of
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import as_float32, by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.limits import Limits, multiprocessors
from mamba_ops.ops.mamba_chunk_scan.triton.hopper_launch import (
    PIECE,
    is_hopper_walk,
    launch_advance,
    launch_walk,
)
from mamba_ops.ops.mamba_chunk_scan.triton.kernels import _scan, _states, _steps

if TYPE_CHECKING:
    from mamba_ops.ops.mamba_chunk_scan.op import Arguments


def _segment(pieces: int, piece: int, programs: int, at_once: int) -> int:
    """Return how many pieces a segment has.

    Longer rows are walked over twice: once for the states that segments begin with, one piece after the other, and once
    in parts. There are to be as many segments as keep all multiprocessors busy once; shorter ones are not worth the
    walk for the states before them.

    Args:
        pieces: how many all rows have, at most.
        piece: tokens of one.
        programs: how many walk over a segment.
        at_once: how many run at once; 0 for the portable kernels, of which each length of segments is a variant. Their
            bits depend on segments, too, which only the op's sizes say.
    """
    if INTERPRETED:
        return 4  # several in few tokens
    if at_once == 0:
        return max((2048 if programs >= 96 else 1024) // piece, 4)
    return max(cdiv(pieces, max(at_once // programs, 1)), 1024 // piece)


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
    operand = operand_dtype(x, B, C)
    x, B, C = as_float32(operand, x, B, C)
    launches = _launches(x.get_device(), dim, dstate, operand.itemsize)
    steps_of, states, scan = (launches[kernel] for kernel in ("_steps", "_states", "_scan"))
    aligned = all(
        t is None or (t.data_ptr() | t.stride(0) * t.itemsize | t.shape[-1] * t.itemsize) % 16 == 0
        for t in (x, B, C, z, written)
    )
    slot_stride, *inner = (-1, 0, 0, 0) if call.ssm_state is None else call.ssm_state.stride()
    if call.ssm_state is not None:
        aligned &= (call.ssm_state.data_ptr() | slot_stride * call.ssm_state.itemsize) % 16 == 0
        aligned &= is_dense(call.ssm_state)
    of_groups: dict[str, Any] = {"heads": heads, "groups": groups, "dim": dim, "dstate": dstate, "aligned": aligned}
    on_hopper = scan["BLOCK_TOKENS"] == PIECE and is_hopper_walk(x, B, C, z, written, **of_groups)
    # Where no state of a chunk is asked for, no piece needs to end with one.
    chunk = scan["BLOCK_TOKENS"] if kept is None else call.chunk_size
    piece = min(chunk, scan["BLOCK_TOKENS"])
    is_whole = chunk % piece == 0
    extra = 1 if call.num_computed_tokens is None else 2 if is_whole else 3
    pieces = tokens // piece + rows * extra + (0 if is_whole else tokens // chunk)  # at most, as are the next two
    if on_hopper:  # a program has two heads, and a multiprocessor to itself
        segment = _segment(pieces, piece, heads // 2, multiprocessors(x.get_device()))
    else:
        segment = _segment(pieces, piece, heads * cdiv(dim, scan["BLOCK_DIM"]), 0)
    segments, starts_count = pieces // segment + rows, 2 * pieces // segment + 1
    steps = x.new_empty(pieces, heads, 4, scan["BLOCK_TOKENS"], dtype=torch.float32)
    starts = x.new_empty(starts_count, heads, dim, dstate, dtype=torch.float32)
    slots, slots_stride = or_placeholder(call.slots, x, tl.int32)
    write_slots, write_stride = or_placeholder(call.write_slots, x, tl.int32)
    has_initial_state, initial_stride = or_placeholder(
        None if call.ssm_state is None else call.has_initial_state, x, tl.int1
    )
    ssm_state, _ = or_placeholder(call.ssm_state, x, tl.float32)
    num_computed_tokens, computed_stride = or_placeholder(call.num_computed_tokens, x, tl.int32)
    state_strides = (None, None, None) if aligned else inner
    all_or_length = tokens if length is None else length
    sizes = {"HEADS": heads, "CHUNK": chunk, "PIECE": piece}
    state_sizes = {"DIM": dim, "GROUPS": groups, "DSTATE": dstate, "SEGMENT": segment, "ALIGNED": aligned}
    state_sizes["OPERAND"] = getattr(tl, str(operand).removeprefix("torch."))
    of_slots = (call.null_slot, slots_of(call.ssm_state))
    with on_device_of(x):
        if tokens > 0:
            _steps[(pieces, cdiv(heads, steps_of["BLOCK_HEADS"]))](
                dt,
                A,
                dt_bias,
                cu_seqlens,
                num_computed_tokens,
                slots,
                steps,
                dt.stride(0),
                slots_stride,
                computed_stride,
                all_or_length,
                rows,
                extra,
                call.null_slot,
                slots_of(call.ssm_state),
                call.dt_min,
                call.dt_max,
                SOFTPLUS=call.dt_softplus,
                **sizes,
                **steps_of,
            )
            before = (x, B, cu_seqlens, num_computed_tokens, slots, has_initial_state, ssm_state, steps, starts)
            strides_before = (x.stride(0), B.stride(0), slots_stride, initial_stride, computed_stride, slot_stride)
            ends_before = (starts_count, extra, all_or_length, pieces)
            if on_hopper:
                numbers = (*strides_before, *ends_before, segment, *of_slots)
                launch_advance(rows, before, numbers, GROUPS=groups, **sizes)
            else:
                programs = rows * heads * cdiv(dim, states["BLOCK_DIM"]) * cdiv(dstate, states["BLOCK_STATE"])
                _states[(programs,)](
                    *before,
                    *strides_before,
                    *state_strides,
                    *ends_before,
                    *of_slots,
                    **sizes,
                    **state_sizes,
                    **states,
                )
        inputs = (x, B, C, D, z, written, steps, starts, cu_seqlens, num_computed_tokens, slots, write_slots)
        of_states = (has_initial_state, ssm_state, kept)
        strides_of_tokens = (x.stride(0), B.stride(0), C.stride(0), None if z is None else z.stride(0))
        strides_of_rows = (slots_stride, write_stride, initial_stride, computed_stride)
        strides = (*strides_of_tokens, written.stride(0), *strides_of_rows)
        of_chunks = (None, None) if kept is None else (kept.stride(0), kept.shape[0])
        ends = (*of_chunks, rows, starts_count, extra, all_or_length, pieces)
        sizes["D_PER_CHANNEL"] = D is not None and D.dim() == 2
        if on_hopper:
            numbers = (*strides, slot_stride, *ends, segment, *of_slots)
            launch_walk(segments, (*inputs, *of_states), numbers, GROUPS=groups, **sizes)
        else:
            _scan[(segments * heads * cdiv(dim, scan["BLOCK_DIM"]),)](
                *inputs,
                *of_states,
                *strides,
                slot_stride,
                *state_strides,
                *ends,
                *of_slots,
                **sizes,
                **state_sizes,
                **scan,
            )
    write_back(written, call.output, flat)
    if call.chunk_states is not None and kept is not None and kept.data_ptr() != call.chunk_states.data_ptr():
        call.chunk_states.copy_(kept)


@tunable_launch(
    _steps="BLOCK_HEADS num_warps",
    _states="BLOCK_DIM BLOCK_STATE num_warps num_stages",
    _scan="BLOCK_DIM BLOCK_TOKENS num_warps num_stages",
)
def _launches(dim: int, dstate: int, itemsize: int, *, limits: Limits) -> Launches:
    """No side of a matrix product is shorter than 16.

    A program of `_scan` holds the state of a block of channels, what pairs of a piece's tokens keep, and its outputs.
    On Hopper four warps have registers for blocks of 64, elsewhere eight; RDNA and Turing have for less.
    """
    dim, dstate = (max(triton.next_power_of_2(size), 16) for size in (dim, dstate))
    is_wide = itemsize < 4 and not limits.is_small  # float32 goes without matrix units
    wide, is_cdna = 64 if itemsize < 4 else 32, limits.matrix_units == "float32"
    block = 64 if is_wide else 32
    scan = {
        "BLOCK_DIM": max(min(dim, block, 128 * block // dstate), 16),
        "BLOCK_STATE": dstate,
        "BLOCK_TOKENS": block,
        "num_warps": 4 if (limits.is_large and is_wide) or is_cdna else 8,
        "num_stages": 2 if is_wide and not is_cdna else 1,
    }
    states = {
        "BLOCK_DIM": min(dim, wide),
        "BLOCK_STATE": min(dstate, wide),
        "BLOCK_TOKENS": block,
        "num_warps": 8 if limits.is_small else 4,
        "num_stages": 1 if limits.is_small else 3,
    }
    steps = {"BLOCK_TOKENS": block, "BLOCK_HEADS": 1024 // block, "num_warps": 4}
    return {"_steps": steps, "_states": states, "_scan": scan}
