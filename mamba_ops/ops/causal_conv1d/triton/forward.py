"""A depthwise causal convolution over whole sequences, in one launch that asks the host about no length.

A program owns a tile: a few tokens of one sequence by a block of channels. It loads these tokens and the width - 1
before them into registers, all of them before it computes anything, so that the loads are under way together.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    cdiv,
    channel_ptrs,
    final_slot,
    kernel,
    load_flag,
    load_slot,
    offset_ptr,
    on_device_of,
    or_placeholder,
    row_tokens,
    slots_of,
    within,
)
from mamba_ops.ops._triton.launch_config import Launches, tunable_launch
from mamba_ops.ops._triton.layout import by_channel, dense, write_back
from mamba_ops.ops._triton.limits import Limits

if TYPE_CHECKING:
    from mamba_ops.ops.causal_conv1d.op import Arguments

_CHANNELS = 128  # that a warp owns: 8 bytes of bfloat16 a thread


@kernel(first_number="sequences")
def _kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None: no bias
    cu_seqlens_ptr,  # None: every sequence has `length` tokens
    state_ptr,  # this and the next two: see `or_placeholder`
    slots_ptr,
    write_slots_ptr,  # None: states go to where they came from
    initial_ptr,
    output_ptr,
    sequences,  # None without cu_seqlens
    length,  # with cu_seqlens that of all sequences together
    null_slot: tl.int64,
    slot_count: tl.int64,
    slots_stride: tl.int64,
    write_stride,
    initial_stride: tl.int64,
    x_row: tl.int64,
    x_token: tl.int64,
    state_slot: tl.int64,
    state_column: tl.int64,
    state_channel,  # None: 1, and all tokens and columns start at multiples of 16 bytes
    output_row: tl.int64,
    output_token: tl.int64,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HISTORY: tl.constexpr = WIDTH - 1
    ALIGNED: tl.constexpr = state_channel is None
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    tile = program // BLOCKS
    channels = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = channels < DIM

    # First what waits for no index.
    taps: tl.tuple = ()
    for k in tl.static_range(WIDTH):
        taps += (tl.load(weight_ptr + channels * WIDTH + k, mask=inside).to(tl.float32),)
    bias = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channels, mask=inside).to(tl.float32)

    if cu_seqlens_ptr is None:
        tiles = tl.maximum(tl.cdiv(length, BLOCK_T), 1)
        row = (tile // tiles).to(tl.int64)
        tile %= tiles
        first = row
        tokens = length
    else:
        # The tiles of sequence i are numbered from cu_seqlens[i] // BLOCK_T + i on. From one sequence to the next that
        # grows by at least the number of its tiles, so it needs no prefix sum; numbers left over have no tokens.
        row = 0
        above = sequences
        while above - row > 1:
            middle = (row + above) // 2
            if within(tl.load(cu_seqlens_ptr + middle), length) // BLOCK_T + middle <= tile:
                row = middle
            else:
                above = middle
        first, tokens = row_tokens(row, cu_seqlens_ptr, length)
        tile -= (first // BLOCK_T).to(tl.int32) + row
        row = row.to(tl.int64)
    begin = tile * BLOCK_T
    # A sequence without tokens has a tile, too: its past may go to another slot.
    if (begin < 0) | (begin >= tl.maximum(tokens, 1)):
        return
    x_ptr += first * x_row
    output_ptr += first * output_row + begin * output_token

    carried = load_flag(row, initial_ptr, initial_stride)
    slot = load_slot(row, slots_ptr, slots_stride, null_slot, slot_count)
    if slot < 0:
        for t in tl.static_range(BLOCK_T):
            valid = inside & (begin + t < tokens)
            tl.store(offset_ptr(output_ptr + t * output_token, channels, ALIGNED), 0.0, mask=valid)
        return

    window: tl.tuple = ()
    for k in tl.static_range(HISTORY + BLOCK_T):
        token = begin + (k - HISTORY)
        valid = inside & (token >= 0) & (token < tokens)
        of_token = offset_ptr(x_ptr + token * x_token, channels, ALIGNED)
        window += (tl.load(of_token, mask=valid, other=0.0).to(tl.float32),)

    # Only a sequence's first tile looks back into the cache; of both, the cache and x, one is zero.
    source_ptr = state_ptr + slot * state_slot
    looks_back = (tile == 0) & (state_slot >= 0) & carried
    past: tl.tuple = ()
    for k in tl.static_range(HISTORY):
        column = channel_ptrs(source_ptr + k * state_column, channels, state_channel)
        past += (window[k] + tl.load(column, mask=inside & looks_back, other=0.0).to(tl.float32),)
    window = past + window[HISTORY:]

    for t in tl.static_range(BLOCK_T):
        acc = bias
        for k in tl.static_range(WIDTH):
            acc += window[t + k] * taps[k]
        if SILU:
            acc *= tl.sigmoid(acc)
        valid = inside & (begin + t < tokens)
        tl.store(offset_ptr(output_ptr + t * output_token, channels, ALIGNED), acc, mask=valid)

    # The program of the first tile also stores what the sequence leaves in the cache, read from x even where it is
    # another tile's, so that no program writes what another one reads.
    target, stored = final_slot(row, slot, tokens, write_slots_ptr, write_stride, null_slot, slot_count)
    if (tile == 0) & (state_slot >= 0) & stored:
        state_ptr += target * state_slot
        kept: tl.tuple = ()
        for k in tl.static_range(HISTORY):
            place = tokens + k  # in the window at the first token, then on through all inputs
            source = channel_ptrs(source_ptr + place * state_column, channels, state_channel)
            old = tl.load(source, mask=inside & looks_back & (place < HISTORY), other=0.0).to(tl.float32)
            later = offset_ptr(x_ptr + (place - HISTORY) * x_token, channels, ALIGNED)
            new = tl.load(later, mask=inside & (place >= HISTORY), other=0.0).to(tl.float32)
            kept += (tl.where(place < HISTORY, old, new),)
        # The thread that stores a column need not be the one that loaded it: all loads first.
        tl.debug_barrier()
        for k in tl.static_range(HISTORY):
            tl.store(channel_ptrs(state_ptr + k * state_column, channels, state_channel), kept[k], mask=inside)


def causal_conv1d(call: "Arguments") -> None:
    """Write `output` and the final `conv_state` in place; the arguments are those of the op.

    Fast where the channels of `conv_state` are contiguous, and those of all three start at multiples of 16 bytes; else
    a slower variant runs. An `x` whose channels are not contiguous is copied first, as are parameters and cu_seqlens;
    such an output is written through a copy.
    """
    flat = call.cu_seqlens is not None
    sequences = call.x.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    if sequences == 0 or (call.x.numel() == 0 and call.write_slots is None):
        return
    dim, width = call.weight.shape
    x, written = by_channel(call.x, flat), by_channel(call.output, flat)
    x_row, x_token = x.stride(0), x.stride(-2)
    state_slot, state_channel, state_column = (-1, 1, 0) if call.conv_state is None else call.conv_state.stride()
    output_row, output_token = written.stride(0), written.stride(-2)
    starts = (
        (x.data_ptr() | written.data_ptr())
        | (x_row | x_token) * x.element_size()
        | (output_row | output_token) * written.element_size()
    )
    if call.conv_state is not None:
        starts |= call.conv_state.data_ptr() | (state_slot | state_column) * call.conv_state.element_size()
    aligned = state_channel == 1 and starts % 16 == 0

    slots, slots_stride = or_placeholder(call.slots, x, tl.int32)
    write_slots = None if call.write_slots is None else dense(call.write_slots)
    has_initial_state, initial_stride = or_placeholder(call.has_initial_state, x, tl.int1)

    launch = _launches(x.get_device(), dim, width)["_kernel"]
    if not aligned:  # needs more of them
        launch = {name: value for name, value in launch.items() if name != "maxnreg"}
    if call.cu_seqlens is None:
        tiles = sequences * max(cdiv(x.shape[1], launch["BLOCK_T"]), 1)
    else:
        tiles = x.shape[0] // launch["BLOCK_T"] + sequences  # at most: how many there are, the device knows
    with on_device_of(x):
        _kernel[(tiles * cdiv(dim, launch["BLOCK"]),)](
            x,
            call.weight.contiguous(),
            None if call.bias is None else call.bias.contiguous(),
            None if call.cu_seqlens is None else call.cu_seqlens.contiguous(),
            x if call.conv_state is None else call.conv_state,
            slots,
            write_slots,
            has_initial_state,
            written,
            None if call.cu_seqlens is None else sequences,
            x.shape[1] if call.cu_seqlens is None else x.shape[0],
            call.null_slot,
            slots_of(call.conv_state),
            slots_stride,
            None if write_slots is None else write_slots.stride(0),
            initial_stride,
            x_row,
            x_token,
            state_slot,
            state_column,
            None if aligned else state_channel,
            output_row,
            output_token,
            dim,
            width,
            call.silu,
            **launch,
        )
    write_back(written, call.output, flat)


@tunable_launch(_kernel="BLOCK num_warps")
def _launches(dim: int, width: int, *, limits: Limits) -> Launches:
    """A tile has no fewer tokens than a window looks back."""
    block = min(_CHANNELS if limits.caps_registers else 256, triton.next_power_of_2(dim))
    launch = {"BLOCK_T": 16, "BLOCK": block, "num_warps": max(block // _CHANNELS, 1)}
    return {"_kernel": launch | (limits.registers(80) if width <= 4 else {})}
