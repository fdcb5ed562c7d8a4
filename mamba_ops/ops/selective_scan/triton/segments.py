"""What segments of the selective scan begin with: the first two launches of the three that `kernels` tells of."""

# mypy: disable-error-code="assignment"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import final_slot, kernel, load_flag, row_tokens, within
from mamba_ops.ops._triton.decay import finite_rate
from mamba_ops.ops.selective_scan.triton.device import (
    block_slot,
    bounds,
    decay_rates,
    decays,
    in_float32,
    load_entries,
    load_tokens,
    next_chunk,
    next_state,
    products,
    segment_start,
    source_slot,
    step_size,
    store_state,
    zeros,
)


@kernel(first_number="rows", static="states sums")
def _ends(
    x,
    dt,
    A,
    B,
    dt_bias,
    slots,
    cu_seqlens,
    initial_block,
    chunk_ends,
    last_chunk,
    states,  # out: (chunks, dstate, dim)
    sums,  # out: (chunks, dim), of the step sizes
    rows,
    length,  # of a row; with cu_seqlens that of all rows together
    segment,
    null_slot,
    slot_count,
    one,
    A_channel,
    A_entry,
    slots_stride,
    slots_columns,
    x_token,
    dt_token,
    B_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    chunk = program // (BLOCKS * GROUPS)
    group = program // BLOCKS % GROUPS
    in_group = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    in_dim = in_group < OF_GROUP
    channel = group * OF_GROUP + in_group
    entry = tl.arange(0, PARTS)[:, None] * WIDTH

    row, low, high, _, is_last = bounds(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS)
    if (row >= rows) | is_last:
        return
    if source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count) < 0:
        return
    if chunk_ends is None:
        first, until = segment_start(row, cu_seqlens, length, segment, CHUNK)
        if low - first >= until * CHUNK:
            return
        chunk = low // CHUNK + row
    rates = decay_rates(A, channel[None, :], A_channel, in_dim[None, :], A_entry, DSTATE, entry, WIDTH)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)

    apart = channel * (one - 1)
    B += low.to(tl.int64) * B_token + group * DSTATE + apart
    x += low.to(tl.int64) * x_token + channel
    dt += low.to(tl.int64) * dt_token + channel
    s = zeros(rates[0], WIDTH)
    total = tl.zeros([BLOCK], tl.float32)
    tiles = (high - low) // TOKENS
    values = load_tokens(x, x_token, in_dim & (tiles > 0), TOKENS)
    d = load_tokens(dt, dt_token, in_dim & (tiles > 0), TOKENS)
    for tile in range(tiles):
        # Taken out of where the next tokens' go before those are asked for: a register then waits for neither.
        rhs = in_float32(values)
        steps = in_float32(d)
        more = tl.where(tile + 1 < tiles, TOKENS, 0).to(tl.int64)
        x += more * x_token
        dt += more * dt_token
        values = load_tokens(x, x_token, in_dim, TOKENS)
        d = load_tokens(dt, dt_token, in_dim, TOKENS)
        for token in tl.static_range(TOKENS):
            b = load_entries(B + token * B_token.to(tl.int64), DSTATE, PARTS, WIDTH, WORDS)
            step = step_size(steps[token], bias, SOFTPLUS)
            added = products((step * rhs[token])[None, :], b, WIDTH)
            s = next_state(s, decays(step[None, :], rates, WIDTH), added, WIDTH)
            total += step
        B += TOKENS * B_token.to(tl.int64)
    if chunk_ends is not None:  # others that are followed by one are whole
        x += tl.minimum(tiles, 1).to(tl.int64) * TOKENS * x_token
        dt += tl.minimum(tiles, 1).to(tl.int64) * TOKENS * dt_token
        for _ in range(low + tiles * TOKENS, high):
            b = load_entries(B, DSTATE, PARTS, WIDTH, WORDS)
            step = step_size(tl.load(dt, in_dim, other=0.0).to(tl.float32), bias, SOFTPLUS)
            rhs_1 = tl.load(x, in_dim, other=0.0).to(tl.float32)
            added = products((step * rhs_1)[None, :], b, WIDTH)
            s = next_state(s, decays(step[None, :], rates, WIDTH), added, WIDTH)
            total += step
            x += x_token
            dt += dt_token
            B += B_token
    states += chunk.to(tl.int64) * (DSTATE * DIM)
    store_state(states, s, channel[None, :], one, in_dim[None, :], DIM, DSTATE, entry, WIDTH)
    tl.store(sums + chunk.to(tl.int64) * DIM + channel * one, total, in_dim)


@kernel(first_number="length", static="states sums")
def _starts(
    A,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    cu_seqlens,
    first_block,
    initial_block,
    chunk_ends,
    last_chunk,
    states,  # in: what chunks leave; out: what they begin with
    sums,
    length,  # of a row; with cu_seqlens that of all rows together
    segment,
    null_slot,
    slot_count,
    A_channel,
    A_entry,
    slots_stride,
    slots_columns,
    write_stride,
    initial_stride,
    slot_stride,
    dim_stride,
    dstate_stride,
    block_size,
    given_chunks,  # how many chunk_ends has
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * DSTATE)
    channel = program // DSTATE % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    entry = program % DSTATE
    in_dim = channel < DIM

    source = source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count)
    if source < 0:
        return
    if chunk_ends is not None:
        first = within(tl.load(last_chunk + row - 1, row > 0, other=-1).to(tl.int32) + 1, given_chunks)
        chunks = within(tl.load(last_chunk + row).to(tl.int32) + 1, given_chunks) - first
        low = within(tl.load(chunk_ends + first - 1, first > 0, other=0), length).to(tl.int32)
        count = chunks
    else:
        low, chunks = segment_start(row, cu_seqlens, length, segment, CHUNK)
        first = low // CHUNK + row
        chunks += 1
        count = length
        if cu_seqlens is not None:
            _, count = row_tokens(row, cu_seqlens, length)

    of_state = channel.to(tl.int64) * dim_stride + entry.to(tl.int64) * dstate_stride
    carried = in_dim & load_flag(row, has_initial_state, initial_stride)
    s = tl.load(ssm_state + source * slot_stride + of_state, carried, other=0.0).to(tl.float32)

    if count <= 0:  # no token, no chunk: the state moves as it is, if it is to move
        target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
        tl.store(ssm_state + target * slot_stride + of_state, s, in_dim & stored)

    if states is not None:
        if chunks > 1:
            position = low
            if chunk_ends is not None:
                high = within(tl.load(chunk_ends + first), length).to(tl.int32)
                position = tl.load(first_block + row).to(tl.int32) * block_size
                position += tl.maximum(block_size - (high - low), 0)
            rate = tl.load(A + channel * A_channel + entry * A_entry, in_dim, other=0.0).to(tl.float32)
            rate = finite_rate(rate * 1.4426950408889634)
            place = states + first.to(tl.int64) * (DSTATE * DIM) + entry * DIM + channel
            of_chunk = sums + first.to(tl.int64) * DIM + channel
            left = _of_chunks(place, DSTATE * DIM, in_dim, chunks - 1, AHEAD)
            total = _of_chunks(of_chunk, DIM, in_dim, chunks - 1, AHEAD)
            for number in range(0, chunks - 1, AHEAD):
                place += AHEAD * DSTATE * DIM
                of_chunk += AHEAD * DIM
                next_left = _of_chunks(place, DSTATE * DIM, in_dim, chunks - 1 - AHEAD - number, AHEAD)
                next_total = _of_chunks(of_chunk, DIM, in_dim, chunks - 1 - AHEAD - number, AHEAD)
                for ahead in tl.static_range(AHEAD):
                    there = number + ahead < chunks - 1
                    begins = there & ((number + ahead) % segment == 0)
                    tl.store(place + (ahead - AHEAD) * DSTATE * DIM, s, in_dim & begins)
                    (s,) = next_chunk((s,), (rate,), total[ahead], (left[ahead],), 1)
                    if chunk_ends is not None:
                        high = within(tl.load(chunk_ends + first + number + ahead, there, other=0), length).to(tl.int32)
                        position += high - low
                        low = high
                        column = (position - 1) // block_size
                        target, stored = block_slot(
                            row, column, slots, slots_stride, slots_columns, null_slot, slot_count
                        )
                        tl.store(ssm_state + target * slot_stride + of_state, s, in_dim & there & stored)
                left = next_left
                total = next_total
            place = states + (first + chunks - 1).to(tl.int64) * (DSTATE * DIM) + entry * DIM + channel
            tl.store(place, s, in_dim)


@triton.jit
def _of_chunks(pointers, stride, in_dim, chunks, AHEAD: tl.constexpr):
    # What the next chunks left, zeros past the last one.
    found = ()
    for ahead in tl.static_range(AHEAD):
        found += (tl.load(pointers + ahead * stride, in_dim & (ahead < chunks), other=0.0),)
    return found
