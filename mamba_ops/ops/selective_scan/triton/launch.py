"""How the kernels of the selective scan are launched."""

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import INTERPRETED, cdiv, on_device_of, options, or_placeholder, slots_of
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back
from mamba_ops.ops._triton.limits import Limits, limits_of
from mamba_ops.ops._triton.slices import are_many
from mamba_ops.ops.selective_scan.triton.kernels import _outputs
from mamba_ops.ops.selective_scan.triton.lanes import _lanes
from mamba_ops.ops.selective_scan.triton.segments import _ends, _starts

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.op import Arguments

CHUNK = 64  # tokens, counted from a row's first one
PROGRAMS = 2048  # about as many walk over segments of rows side by side, where there are tokens enough
MANY = 24576  # channels of all rows, from which on lanes share states: three warps for each scheduler of an H200
WIDEST = 1 if INTERPRETED else 16  # numbers of a state in a thread: few operations on large tensors interpret fast


def _segment(tokens: int, programs: int) -> int:
    """Return how many chunks a segment has, by the tokens of all rows and how many programs walk over one.

    A row's other segments than the last are walked over twice: the fewer they are the better, but a GPU must be full.
    No bit of a result depends on it.
    """
    if INTERPRETED:
        return 2  # several in few tokens
    return max(tokens * programs // (PROGRAMS * CHUNK), 1)


def selective_scan(call: "Arguments") -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense: others are copied first, as are parameters and index tensors that are
    not, and an output that is not is written through a copy. States that are not dense within a slot are another
    variant.
    """
    flat = call.cu_seqlens is not None
    rows = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    length = None if flat else call.x.shape[1]
    if rows == 0:
        return
    written = by_token(call.output, flat)
    x, dt, B, C = by_token(call.x, flat), by_token(call.dt, flat), by_token(call.B, flat), by_token(call.C, flat)
    z = None if call.z is None else by_token(call.z, flat)
    (dim, dstate), tokens, groups = call.A.shape, x.shape[0], B.shape[1] if B.dim() == 3 else 1
    launches = _launches(x.get_device(), dim, dstate)
    ends, starts, outputs = (launches[kernel] for kernel in ("_ends", "_starts", "_outputs"))
    programs = groups * cdiv(dim // groups, outputs["BLOCK"])
    by_lanes = outputs["WAYS"] == 4 and call.chunk_ends is None and (rows * dim >= MANY or are_many())
    if by_lanes:
        outputs = _launch_of_lanes(x.get_device(), dstate, B.itemsize)
        programs *= 4  # segments of four times as many tokens: rows that are about as long as others are not cut
    segment = _segment(tokens, programs)
    if call.chunk_ends is not None:
        chunks = segments = call.chunk_ends.shape[0]
        segment = 1
    elif length is not None:
        chunks, segments = rows * cdiv(length, CHUNK), rows * cdiv(length, CHUNK * segment)
    else:
        chunks, segments = tokens // CHUNK + rows, tokens // (CHUNK * segment) + rows
    several = call.chunk_ends is not None or segments > rows  # a row may have more than one
    moves = call.write_slots is not None and call.ssm_state is not None and (length is None or length == 0)

    D, dt_bias, cu_seqlens = (None if t is None else t.contiguous() for t in (call.D, call.dt_bias, call.cu_seqlens))
    first_block, last_block, initial_block, chunk_ends, last_chunk = (
        None if t is None else t.contiguous()
        for t in (call.first_block, call.last_block, call.initial_block, call.chunk_ends, call.last_chunk)
    )
    slots, slots_stride = or_placeholder(None if call.slots is None else dense(call.slots), x, tl.int32)
    slots_columns = None if call.initial_block is None or call.slots is None else call.slots.shape[1]
    length_or_all, slot_count = tokens if length is None else length, slots_of(call.ssm_state)
    has_initial_state, write_slots = call.has_initial_state, call.write_slots
    if call.ssm_state is None:  # no state to start from, none to store
        has_initial_state = write_slots = None
    write_slots, write_stride = or_placeholder(None if write_slots is None else dense(write_slots), x, tl.int32)
    has_initial_state, initial_stride = or_placeholder(has_initial_state, x, tl.int1)
    slot_stride, dim_stride, dstate_stride = (-1, 0, 0) if call.ssm_state is None else call.ssm_state.stride()
    is_plain = call.ssm_state is None or is_dense(call.ssm_state)
    ssm_state, _ = or_placeholder(call.ssm_state, x, tl.float32)

    words_of_ends = all(in_words(t, ends["WIDTH"]) for t in (B, C))
    words = all(in_words(t, outputs["WIDTH"], 8 if by_lanes else 16) for t in (B, C))
    sizes = {"DIM": dim, "DSTATE": dstate, "CHUNK": CHUNK}
    sizes_of_tokens = {**sizes, "BLOCK_ROWS": 128, "GROUPS": groups, "SOFTPLUS": call.dt_softplus}
    states = sums = None
    with on_device_of(x):
        if several and tokens:
            places = chunks if call.chunk_ends is not None else tokens // CHUNK + rows
            states = torch.empty(places, dstate, dim, dtype=torch.float32, device=x.device)
            sums = torch.empty(places, dim, dtype=torch.float32, device=x.device)
            _ends[(chunks * groups * cdiv(dim // groups, ends["BLOCK"]),)](
                x,
                dt,
                call.A,
                B,
                dt_bias,
                slots,
                cu_seqlens,
                initial_block,
                chunk_ends,
                last_chunk,
                states,
                sums,
                rows,
                length_or_all,
                segment,
                call.null_slot,
                slot_count,
                1,
                *call.A.stride(),
                slots_stride,
                slots_columns,
                x.stride(0),
                dt.stride(0),
                B.stride(0),
                **sizes_of_tokens,
                WORDS=words_of_ends,
                **ends,
            )
        if (several and tokens) or moves:
            _starts[(rows * cdiv(dim, starts["BLOCK"]) * dstate,)](
                call.A,
                ssm_state,
                slots,
                write_slots,
                has_initial_state,
                cu_seqlens,
                first_block,
                initial_block,
                chunk_ends,
                last_chunk,
                states,
                sums,
                length_or_all,
                segment,
                call.null_slot,
                slot_count,
                *call.A.stride(),
                slots_stride,
                slots_columns,
                write_stride,
                initial_stride,
                slot_stride,
                dim_stride,
                dstate_stride,
                call.block_size or None,
                None if chunk_ends is None else chunks,
                **sizes,
                **starts,
            )
        if tokens == 0 or chunks == 0:
            return
        (_lanes if by_lanes else _outputs)[(segments * groups * cdiv(dim // groups, outputs["BLOCK"]),)](
            x,
            dt,
            call.A,
            B,
            C,
            D,
            z,
            dt_bias,
            written,
            ssm_state,
            slots,
            write_slots,
            has_initial_state,
            cu_seqlens,
            last_block,
            initial_block,
            *(() if by_lanes else (chunk_ends, last_chunk)),
            or_placeholder(states, x, tl.float32)[0],
            rows,
            length_or_all,
            segment,
            call.null_slot,
            slot_count,
            1,
            *call.A.stride(),
            slots_stride,
            slots_columns,
            write_stride,
            initial_stride,
            slot_stride,
            None if is_plain else dim_stride,
            None if is_plain else dstate_stride,
            x.stride(0),
            dt.stride(0),
            None if z is None else z.stride(0),
            written.stride(0),
            B.stride(0),
            C.stride(0),
            **sizes_of_tokens,
            WORDS=words,
            **outputs,
        )
    write_back(written, call.output, flat)


def in_words(tensor: Tensor, width: int, least: int = 16) -> bool:
    """Whether `width` numbers of the B or C of every token and group are whole words of 16 bytes, or of `least`."""
    size = tensor.itemsize
    word = min(16, width * size)
    ends = tensor.data_ptr() | tensor.stride(0) * size | tensor.shape[-1] * size | width * size
    return size <= 4 and word >= least and ends % word == 0


@tunable_launch(_ends="BLOCK num_warps", _starts="BLOCK num_warps", _outputs="BLOCK num_warps")
def _launches(dim: int, dstate: int, *, limits: Limits) -> Launches:
    """A thread has a channel, with up to 16 numbers of its state.

    Outputs are summed in four parts where lanes may share states (`_launch_of_lanes`), which costs 2 %.
    """
    padded = triton.next_power_of_2(dstate)
    width = min(padded, WIDEST) if padded > 4 else padded
    parts = padded // width
    block = 32 if INTERPRETED else max(min(64 // parts, 32), 8)
    of_channels = {"BLOCK": block, "PARTS": parts, "WIDTH": width, "num_warps": 1}
    limit = limits.registers(128) if parts == 1 else {}
    return {
        "_ends": {**of_channels, "TOKENS": 4, **limit},
        "_starts": {"BLOCK": 128, "AHEAD": 4, "num_warps": 1},
        "_outputs": {**of_channels, "WAYS": 4 if parts == 1 and padded > 4 else 1, **limit},
    }


@functools.cache
def _launch_of_lanes(device: int, dstate: int, itemsize: int) -> dict[str, Any]:
    """Return the launch of `_lanes`: four lanes share the states of two channels, so that a warp has those of 16."""
    width = triton.next_power_of_2(dstate) // 4
    block = 64 if INTERPRETED else 16
    launch = {"BLOCK": block, "CHANNELS": 2, "PARTS": 4, "LEVELS": 2, "WIDTH": width, "num_warps": 1}
    return options(**launch, **limits_of(device).registers(128 if itemsize <= 2 else 168))
