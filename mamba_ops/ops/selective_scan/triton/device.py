"""Device functions of the selective scan's kernels.

A state is in registers, and not one tensor, which Triton would spread over threads as it sees fit, but a tuple of up to
16, each with one number of every channel. A thread that has a channel has all of it, and threads exchange nothing.
Larger states, and those that lanes share, have several such numbers (parts) in each tensor of the tuple: `entry` says
of every place of a tensor which entry of a state the first one of its tuple is.
"""

# mypy: disable-error-code="assignment,misc"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, is_slot, load_slot, row_tokens, softplus, within
from mamba_ops.ops._triton.decay import finite_rate


@triton.jit
def bounds(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS: tl.constexpr):
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
def segment_start(row, cu_seqlens, length, segment, CHUNK: tl.constexpr):
    # A row's first token, and the number of the chunk of that row with which its last segment begins.
    if cu_seqlens is not None:
        begin, count = row_tokens(row, cu_seqlens, length)
    else:
        begin = row.to(tl.int64) * length
        count = length
    last = tl.maximum(count - 1, 0) // CHUNK
    return begin.to(tl.int32), last // segment * segment


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
def load_tokens(pointers, stride, mask, TOKENS: tl.constexpr):
    # The numbers of some tokens as they lie in memory.
    found = ()
    for token in tl.static_range(TOKENS):
        found += (tl.load(pointers + token * stride.to(tl.int64), mask, other=0.0),)
    return found


@triton.jit
def in_float32(values):
    found = ()
    for i in tl.static_range(len(values)):
        found += (values[i].to(tl.float32),)
    return found


@triton.jit
def load_entries(
    tensor,  # for every channel an address; compilers do not know that all are one
    DSTATE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    # B or C of a token in float32: WIDTH tensors. Every thread reads all numbers by an address of its own. One address
    # of all would be copied for each read, from where a program has what its threads have in common.
    # WORDS: 16 bytes at once, else number by number.
    numbers = ()
    part = tl.arange(0, PARTS)[:, None]
    if WORDS:
        COUNT: tl.constexpr = 128 // tensor.dtype.element_ty.primitive_bitwidth
        words = tensor.to(tl.pointer_type(tl.int32), bitcast=True)
        for word in tl.static_range(WIDTH // COUNT):
            entry = part * WIDTH + word * COUNT
            place = words[None, :, None] + (entry[:, :, None] * 4 // COUNT + tl.arange(0, 4)[None, None, :])
            place = tl.multiple_of(place, (16, 16, 16))
            if PARTS * WIDTH > DSTATE:
                found = tl.load(place, (entry < DSTATE)[:, :, None], other=0)
            else:
                found = tl.load(place)
            evens, odds = tl.split(tl.reshape(found, [PARTS, tensor.shape[0], 2, 2]))
            evens = tl.split(evens)
            odds = tl.split(odds)
            for pair in tl.static_range(2):
                numbers += numbers_of(evens[pair], tensor.dtype.element_ty) + numbers_of(
                    odds[pair], tensor.dtype.element_ty
                )
    else:
        for number in tl.static_range(WIDTH):
            entry = part * WIDTH + number
            place = tensor[None, :] + entry
            if PARTS * WIDTH > DSTATE:
                numbers += (tl.load(place, entry < DSTATE, other=0.0).to(tl.float32),)
            else:
                numbers += (tl.load(place).to(tl.float32),)
    return numbers


@triton.jit
def numbers_of(word, dtype: tl.constexpr):
    # The numbers in words of 32 bits, in float32.
    if dtype == tl.float32:
        return (word.to(tl.float32, bitcast=True),)
    elif dtype == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def load_state(
    pointer, channel, channel_stride, in_dim, entry_stride, DSTATE: tl.constexpr, entry, WIDTH: tl.constexpr
):
    # The states of some channels, in float32.
    found = ()
    for number in tl.static_range(WIDTH):
        place = pointer + channel * channel_stride + (entry + number) * entry_stride
        found += (tl.load(place, (entry + number < DSTATE) & in_dim, other=0.0).to(tl.float32),)
    return found


@triton.jit
def store_state(
    pointer, values, channel, channel_stride, in_dim, entry_stride, DSTATE: tl.constexpr, entry, WIDTH: tl.constexpr
):
    for number in tl.static_range(WIDTH):
        place = pointer + channel * channel_stride + (entry + number) * entry_stride
        tl.store(place, values[number], (entry + number < DSTATE) & in_dim)


@triton.jit
def decays(step, rates, WIDTH: tl.constexpr):
    found = ()
    for number in tl.static_range(WIDTH):
        found += (tl.exp2(rates[number] * step),)
    return found


@triton.jit
def products(pushed, into, WIDTH: tl.constexpr):
    found = ()
    for number in tl.static_range(WIDTH):
        found += (pushed * into[number],)
    return found


@triton.jit
def next_state(s, decay, added, WIDTH: tl.constexpr):
    # The states after a token. The fused operation is named: kernels that run the same chunk get the same bits.
    after = ()
    for number in tl.static_range(WIDTH):
        after += (tl.fma(s[number], decay[number], added[number]),)
    return after


@triton.jit
def next_chunk(s, rates, total, left, WIDTH: tl.constexpr):
    # The states after a chunk, by those before it and what the chunk leaves of nothing: the same bits in every kernel.
    after = ()
    for number in tl.static_range(WIDTH):
        after += (tl.fma(s[number], tl.exp2(rates[number] * total), left[number]),)
    return after


@triton.jit
def zeros(like, COUNT: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found += (tl.zeros(like.shape, tl.float32),)
    return found


@triton.jit
def decay_rates(A, channel, A_channel, in_dim, A_entry, DSTATE: tl.constexpr, entry, WIDTH: tl.constexpr):
    rates = ()
    found = load_state(A, channel, A_channel, in_dim, A_entry, DSTATE, entry, WIDTH)
    for number in tl.static_range(WIDTH):
        rates += (finite_rate(found[number] * 1.4426950408889634),)
    return rates


@triton.jit
def read_out(s, c, WIDTH: tl.constexpr, WAYS: tl.constexpr):
    # The sum of a state's entries times c. In four parts where lanes may share such states: in the order in which they
    # add theirs, so that bits are the same.
    parts = ()
    for way in tl.static_range(WAYS):
        sums = s[way * (WIDTH // WAYS)] * c[way * (WIDTH // WAYS)]
        for k in tl.static_range(way * (WIDTH // WAYS) + 1, (way + 1) * (WIDTH // WAYS)):
            sums = tl.fma(s[k], c[k], sums)
        parts += (sums,)
    if WAYS == 4:
        return (parts[0] + parts[1]) + (parts[2] + parts[3])
    else:
        return parts[0]


@triton.jit
def step_size(d, bias, SOFTPLUS: tl.constexpr):
    if bias is not None:
        d += bias
    if SOFTPLUS:
        d = softplus(d)
    return d
