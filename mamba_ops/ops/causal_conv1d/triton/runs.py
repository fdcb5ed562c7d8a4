"""The forward kernel of causal_conv1d where the tokens of a channel are contiguous, in x, in the output or in both.

A thread owns a run of tokens of a channel: it loads them at once, and the run before it, which has the inputs that its
first tokens look back to. Where the other tensor has its channels contiguous, the tile is transposed on chip.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import channel_ptrs, kernel, load_flag, load_slot
from mamba_ops.ops.causal_conv1d.triton.tiles import convolved, keep, load_bias, load_taps, tile_of


@kernel(first_number="sequences")
def _runs(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None: no bias
    cu_seqlens_ptr,  # None: every sequence has `length` tokens
    state_ptr,  # this and the next two: see `or_placeholder`
    slots_ptr,
    write_slots_ptr,
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
    x_token,  # this and the next: None: 1
    x_channel,
    state_slot: tl.int64,
    state_column: tl.int64,
    state_channel: tl.int64,
    output_row: tl.int64,
    output_token,  # this and the next: None: 1
    output_channel,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    ALIGNED: tl.constexpr,  # the channels' first tokens, or the tokens' first channels, start at multiples of 16 bytes
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HISTORY: tl.constexpr = WIDTH - 1
    RUN: tl.constexpr = 4 if x_ptr.dtype.element_ty.primitive_bitwidth == 32 and HISTORY <= 4 else 8
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channels = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = (channels < DIM) | (DIM % BLOCK == 0)

    taps = load_taps(weight_ptr, channels, inside, WIDTH)
    bias = load_bias(bias_ptr, channels, inside)

    row, first, tokens, tile = tile_of(program // BLOCKS, cu_seqlens_ptr, sequences, length, BLOCK_T)
    begin = tile * BLOCK_T
    if cu_seqlens_ptr is not None:
        # Tiles start at multiples of BLOCK_T of all tokens, so that their runs are aligned whatever the lengths are.
        begin -= (first % BLOCK_T).to(tl.int32)
    if (tile < 0) | (begin >= tl.maximum(tokens, 1)):
        return
    x_ptr += first * x_row
    output_ptr += first * output_row

    carried = load_flag(row, initial_ptr, initial_stride)
    slot = load_slot(row, slots_ptr, slots_stride, null_slot, slot_count)
    token = (begin + tl.arange(0, BLOCK_T))[None, :]
    of_channel = inside[:, None]
    if slot < 0:
        written = _pointers(output_ptr, channels, output_channel, begin, output_token, BLOCK_T, ALIGNED)
        valid = of_channel & (token >= 0) & (token < tokens)
        tl.store(written, tl.zeros([BLOCK, BLOCK_T], tl.float32), mask=valid)
        return

    looks_back = (tile == 0) & (state_slot >= 0) & carried
    # Most tiles need no mask and no cache; apart from the others, they need fewer registers, too.
    if (begin >= RUN) & (begin + BLOCK_T <= tokens):
        of_earlier = _pointers(x_ptr, channels, x_channel, begin - RUN, x_token, BLOCK_T, ALIGNED)
        of_tile = _pointers(x_ptr, channels, x_channel, begin, x_token, BLOCK_T, ALIGNED)
        earlier = tl.load(of_earlier, mask=of_channel, other=0.0)
        outputs = _outputs_of(earlier, tl.load(of_tile, mask=of_channel, other=0.0), taps, bias, output_ptr, RUN, SILU)
        to_tile = _pointers(output_ptr, channels, output_channel, begin, output_token, BLOCK_T, ALIGNED)
        tl.store(to_tile, outputs, mask=of_channel)
    else:
        valid = of_channel & (token >= 0) & (token < tokens)
        valid_earlier = of_channel & (token >= RUN) & (token < tokens + RUN)
        of_edge = _pointers(x_ptr, channels, x_channel, begin, x_token, BLOCK_T, ALIGNED)
        of_past = _pointers(x_ptr, channels, x_channel, begin - RUN, x_token, BLOCK_T, ALIGNED)
        edge = tl.load(of_edge, mask=valid, other=0.0).to(tl.float32)
        past = tl.load(of_past, mask=valid_earlier, other=0.0).to(tl.float32)
        for k in tl.static_range(HISTORY):
            # Of both, the cache and x, one is zero.
            column = channel_ptrs(state_ptr + slot * state_slot + k * state_column, channels, state_channel)
            cached = tl.load(column, mask=inside & looks_back, other=0.0).to(tl.float32)[:, None]
            edge += tl.where(token + HISTORY == k, cached, 0.0)
            past += tl.where(token - RUN + HISTORY == k, cached, 0.0)
        of_output = _pointers(output_ptr, channels, output_channel, begin, output_token, BLOCK_T, ALIGNED)
        tl.store(of_output, _outputs_of(past, edge, taps, bias, output_ptr, RUN, SILU), mask=valid)

    if tile == 0:
        keep(
            row,
            slot,
            tokens,
            looks_back,
            x_ptr,
            1 if x_token is None else x_token,
            1 if x_channel is None else x_channel,
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
            HISTORY,
        )


@triton.jit
def _pointers(pointer, channels, channel_stride, begin, token_stride, BLOCK_T: tl.constexpr, ALIGNED: tl.constexpr):
    # Pointers to (channels, tokens from `begin` on); the stride that is None is 1. The tokens of a thread's run come
    # last: by how much they differ is part of an access then, and takes no registers.
    token = tl.arange(0, BLOCK_T)[None, :]
    if token_stride is None:
        pointers = pointer + begin + channels.to(tl.int64)[:, None] * channel_stride + token
        if ALIGNED:
            pointers = tl.multiple_of(pointers, (1, 16))
    else:
        pointers = pointer + begin.to(tl.int64) * token_stride + channels[:, None] + token.to(tl.int64) * token_stride
        if ALIGNED:
            pointers = tl.multiple_of(pointers, (16, 1))
    return pointers


@triton.jit
def _entries(tile, BLOCK: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr):
    # The first tokens of all runs, the second ones and so on, each (channels, runs). All are in the thread that has the
    # run, so nothing is moved.
    parts: tl.tuple = (tl.reshape(tile, [BLOCK, RUNS, RUN]),)
    for level in tl.static_range(2 if RUN == 4 else 3):
        halves: tl.tuple = ()
        for i in tl.static_range(1 << level):
            both = tl.reshape(parts[i], [BLOCK, RUNS, 2, RUN >> (level + 1)])
            left, right = tl.split(tl.permute(both, (0, 1, 3, 2)))
            halves += (left, right)
        parts = halves
    entries: tl.tuple = ()
    for i in tl.static_range(RUN):
        entries += (tl.reshape(parts[i], [BLOCK, RUNS]),)
    return entries


@triton.jit
def _outputs_of(earlier, now, taps, bias, output_ptr, RUN: tl.constexpr, SILU: tl.constexpr):
    # The outputs of a tile, (channels, tokens), from its inputs and those of the run before each of its runs.
    WIDTH: tl.constexpr = len(taps)
    BLOCK: tl.constexpr = now.shape[0]
    RUNS: tl.constexpr = now.shape[1] // RUN
    window = _entries(earlier, BLOCK, RUNS, RUN)[RUN + 1 - WIDTH :] + _entries(now, BLOCK, RUNS, RUN)
    by_channel: tl.tuple = ()
    for k in tl.static_range(WIDTH):
        by_channel += (taps[k][:, None],)
    parts: tl.tuple = ()
    for t in tl.static_range(RUN):
        output = convolved(
            window[t : t + WIDTH], by_channel, bias[:, None], output_ptr.dtype.element_ty.primitive_bitwidth, SILU
        )
        parts += (tl.reshape(output.to(output_ptr.dtype.element_ty), [BLOCK, RUNS, 1]),)
    for level in tl.static_range(2 if RUN == 4 else 3):
        wholes: tl.tuple = ()
        for i in tl.static_range(RUN >> (level + 1)):
            both = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), (0, 1, 3, 2))
            wholes += (tl.reshape(both, [BLOCK, RUNS, 2 << level]),)
        parts = wholes
    return tl.reshape(parts[0], [BLOCK, RUNS * RUN])
