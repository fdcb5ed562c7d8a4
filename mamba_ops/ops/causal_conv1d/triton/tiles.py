"""What both forward kernels of causal_conv1d share: a program's tile, its taps and sums, and what it leaves behind.

A tile is a few tokens of one sequence by a block of channels.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import channel_ptrs, final_slot, offset_ptr, row_tokens, silu, within


@triton.jit
def tile_of(number, cu_seqlens_ptr, sequences, length, BLOCK_T: tl.constexpr):
    # Of the tile with this number: its sequence, that one's first token (without cu_seqlens its row) and number of
    # tokens, and the tile's number within it, which is negative or beyond the tokens where there is no such tile.
    if cu_seqlens_ptr is None:
        tiles = tl.maximum(tl.cdiv(length, BLOCK_T), 1)
        row = (number // tiles).to(tl.int64)
        return row, row, length, number % tiles
    else:
        # The tiles of sequence i are numbered from cu_seqlens[i] // BLOCK_T + i on. From one sequence to the next that
        # grows by at least the number of its tiles, so it needs no prefix sum; numbers left over have no tokens.
        row = 0
        above = sequences
        while above - row > 1:
            middle = (row + above) // 2
            if within(tl.load(cu_seqlens_ptr + middle), length) // BLOCK_T + middle <= number:
                row = middle
            else:
                above = middle
        first, tokens = row_tokens(row, cu_seqlens_ptr, length)
        return row.to(tl.int64), first, tokens, number - (first // BLOCK_T).to(tl.int32) - row


@triton.jit
def load_taps(weight_ptr, channels, inside, WIDTH: tl.constexpr):
    # Two or four taps of 16 bits are one word: threads side by side then read whole cache lines.
    SIZE: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    BITS: tl.constexpr = WIDTH * SIZE
    taps: tl.tuple = ()
    if SIZE == 16 and (BITS == 64 or BITS == 32):
        word_ptr = weight_ptr.to(tl.pointer_type(tl.int64 if BITS == 64 else tl.int32))
        words = tl.load(offset_ptr(word_ptr, channels, True), mask=inside, other=0)
        for k in tl.static_range(WIDTH):
            bits = (words >> (16 * k)).to(tl.int16)
            taps += (bits.to(weight_ptr.dtype.element_ty, bitcast=True).to(tl.float32),)
    else:
        for k in tl.static_range(WIDTH):
            taps += (tl.load(weight_ptr + channels * WIDTH + k, mask=inside, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_bias(bias_ptr, channels, inside):
    bias = tl.zeros(channels.shape, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(offset_ptr(bias_ptr, channels, True), mask=inside, other=0.0).to(tl.float32)
    return bias


@triton.jit
def convolved(window, taps, bias, BITS: tl.constexpr, SILU: tl.constexpr):
    # What becomes of the inputs in a window, one for each tap; it is stored in so many bits.
    acc = bias
    for k in tl.static_range(len(taps)):
        acc += window[k].to(tl.float32) * taps[k]
    if SILU:
        acc = silu(acc, BITS)
    return acc


@triton.jit
def keep(
    row,
    slot,
    tokens,
    looks_back,
    x_ptr,  # at the sequence's first token
    x_token,
    x_channel,  # this and state_channel: see `channel_ptrs`
    state_ptr,
    write_slots_ptr,
    write_stride,
    null_slot,
    slot_count,
    state_slot,
    state_column,
    state_channel,
    channels,
    inside,
    HISTORY: tl.constexpr,
):
    # Store what a sequence leaves in the cache. The program of its first tile does that, and reads it from x even where
    # it is another tile's, so that no program writes what another one reads.
    target, stored = final_slot(row, slot, tokens, write_slots_ptr, write_stride, null_slot, slot_count)
    if (state_slot >= 0) & stored:
        source_ptr = state_ptr + slot * state_slot
        target_ptr = state_ptr + target * state_slot
        kept: tl.tuple = ()
        for k in tl.static_range(HISTORY):
            place = tokens + k  # in the window at the first token, then on through all inputs
            source = channel_ptrs(source_ptr + place * state_column, channels, state_channel)
            old = tl.load(source, mask=inside & looks_back & (place < HISTORY), other=0.0).to(tl.float32)
            later = channel_ptrs(x_ptr + (place - HISTORY) * x_token, channels, x_channel)
            new = tl.load(later, mask=inside & (place >= HISTORY), other=0.0).to(tl.float32)
            kept += (tl.where(place < HISTORY, old, new),)
        # The thread that stores a column need not be the one that loaded it: all loads first.
        tl.debug_barrier()
        for k in tl.static_range(HISTORY):
            tl.store(channel_ptrs(target_ptr + k * state_column, channels, state_channel), kept[k], mask=inside)
