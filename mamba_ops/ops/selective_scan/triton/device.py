"""Device functions of the selective scan's kernels.

A thread has a channel with all its state in registers, and threads exchange nothing: a state is not one tensor, which
Triton would spread over threads as it sees fit, but a tuple of up to 16, each with one number of every channel. Larger
states have several such numbers (parts) in each tensor of the tuple.
"""

# mypy: disable-error-code="assignment"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, is_slot, load_slot, softplus, within
from mamba_ops.ops._triton.decay import finite_rate


@triton.jit
def bounds(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    # A chunk's row (`rows` if there is no such chunk), the range of its tokens, and whether it is the row's first and
    # last one.
    if chunk_ends is not None:
        row = 0
        first = 0
        for start in range(0, rows, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            last = tl.load(last_chunk + r, r < rows, other=0).to(tl.int32)
            earlier = (r < rows) & (last < chunk)
            row += tl.sum(earlier.to(tl.int32), 0)
            first = tl.maximum(first, tl.max(tl.where(earlier, last + 1, 0), 0))
        low = within(tl.load(chunk_ends + chunk - 1, chunk > 0, other=0), length).to(tl.int32)
        high = within(tl.load(chunk_ends + chunk), length).to(tl.int32)
        is_last = chunk == tl.load(last_chunk + row, row < rows, other=0).to(tl.int32)
        return row, low, high, chunk == first, is_last
    else:
        return chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)


@triton.jit
def source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count):
    # The slot of a row's state, -1 for a padding row; also where initial_block is no column of slots.
    if initial_block is not None:
        column = tl.load(initial_block + row)
        slots += within(column, slots_columns - 1)
        slot = load_slot(row, slots, slots_stride, null_slot, slot_count)
        return tl.where((column >= 0) & (column < slots_columns), slot, -1)
    else:
        return load_slot(row, slots, slots_stride, null_slot, slot_count)


@triton.jit
def block_slot(row, column, slots, slots_stride, slots_columns, null_slot, slot_count):
    # The slot in a column of slots, and whether a state is stored there: not where there is no such column.
    slots += row.to(tl.int64) * slots_stride + within(column, slots_columns - 1)
    slot = tl.load(slots).to(tl.int64)
    return slot, (column >= 0) & (column < slots_columns) & is_slot(slot, null_slot, slot_count)


@triton.jit
def load_entries(tensor, DSTATE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    # B or C of a token as it lies in memory: WIDTH times PARTS numbers, or words of four numbers.
    part = tl.arange(0, PARTS)
    found = ()
    if WORDS:
        tensor = tensor.to(tl.pointer_type(tl.int64), bitcast=True)
        for word in tl.static_range(WIDTH // 4):
            found += (tl.load(tensor + part * (WIDTH // 4) + word, part * WIDTH + word * 4 < DSTATE, other=0),)
    else:
        for number in tl.static_range(WIDTH):
            entry = part * WIDTH + number
            found += (tl.load(tensor + entry, entry < DSTATE, other=0.0),)
    return found


@triton.jit
def as_float32(found, dtype: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    # The same numbers in float32.
    numbers = ()
    if WORDS:
        for word in tl.static_range(WIDTH // 4):
            for half in tl.static_range(2):
                pair = (found[word] >> (32 * half)).to(tl.int32)
                if dtype == tl.bfloat16:
                    low = (pair << 16).to(tl.float32, bitcast=True)
                    high = (pair & -65536).to(tl.float32, bitcast=True)
                else:
                    low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                numbers += (low, high)
    else:
        for number in tl.static_range(WIDTH):
            numbers += (found[number].to(tl.float32),)
    return numbers


@triton.jit
def load_state(
    pointer,
    channel,
    channel_stride,
    in_dim,
    entry_stride,
    DSTATE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # The states of some channels, in float32.
    found = ()
    for number in tl.static_range(WIDTH):
        entry = tl.arange(0, PARTS)[:, None] * WIDTH + number
        place = pointer + channel[None, :] * channel_stride + entry * entry_stride
        found += (tl.load(place, (entry < DSTATE) & in_dim[None, :], other=0.0).to(tl.float32),)
    return found


@triton.jit
def store_state(
    pointer,
    values,
    channel,
    channel_stride,
    in_dim,
    entry_stride,
    DSTATE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    for number in tl.static_range(WIDTH):
        entry = tl.arange(0, PARTS)[:, None] * WIDTH + number
        place = pointer + channel[None, :] * channel_stride + entry * entry_stride
        tl.store(place, values[number], (entry < DSTATE) & in_dim[None, :])


@triton.jit
def next_state(s, step, pushed, rates, into, WIDTH: tl.constexpr):
    # The states after a token.
    after = ()
    for number in tl.static_range(WIDTH):
        after += (s[number] * tl.exp2(rates[number] * step[None, :]) + pushed[None, :] * into[number][:, None],)
    return after


@triton.jit
def decay_rates(A, channel, A_channel, in_dim, A_entry, DSTATE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    rates = ()
    found = load_state(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
    for number in tl.static_range(WIDTH):
        rates += (finite_rate(found[number] * 1.4426950408889634),)
    return rates


@triton.jit
def step_size(d, bias, SOFTPLUS: tl.constexpr):
    if bias is not None:
        d += bias
    if SOFTPLUS:
        d = softplus(d)
    return d
