"""The Mamba-2 recurrence over whole sequences, chunk by chunk, in three launches.

`_prepare` finds every chunk's tokens and what of their past each of them keeps. `_states` walks over the chunks of a
row, with a tile of one head's state in registers. `_outputs` then has all chunks at once: what a token reads of the
state before its chunk, and of the tokens of its chunk. Decays of any strength are exact, by the sums of
`ops/_triton/decay.py`.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    final_slot,
    kernel,
    load_flag,
    load_slot,
    offset_ptr,
    softplus,
    tile_ptrs,
    within,
)
from mamba_ops.ops._triton.decay import exact_sums, finite_rate, split, to_log2


@triton.jit
def _extent(row, inside, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK: tl.constexpr):
    # A row's first token and number of tokens, and how many tokens of its first chunk came before them. `length` is the
    # number of a row's tokens, with cu_seqlens that of all.
    if cu_seqlens is not None:
        begin = within(tl.load(cu_seqlens + row, inside, other=0), length).to(tl.int32)
        count = within(tl.load(cu_seqlens + row + 1, inside, other=0), length).to(tl.int32) - begin
    else:
        begin = row * length
        count = tl.where(inside, length, 0)
    num_computed_tokens += row.to(tl.int64) * computed_stride
    before = tl.load(num_computed_tokens, inside & (computed_stride >= 0), other=0)
    return begin, count, (tl.maximum(before, 0) % CHUNK).to(tl.int32)


@kernel(first_number="dt_stride", static="steps chunks first_chunks")
def _prepare(
    dt,
    A,
    dt_bias,
    cu_seqlens,
    num_computed_tokens,
    slots,
    has_initial_state,
    steps,  # out: (4, heads, tokens), described where they are stored
    chunks,  # out: (chunks, 3): the first token, the one after the last, and the chunk's past: see below
    first_chunks,  # out: (rows,)
    dt_stride,
    slots_stride,
    initial_stride,
    computed_stride,
    length,  # tokens of every row; None: cu_seqlens
    rows,
    tokens,
    null_slot,
    slot_count,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    # The chunk's row is the number of rows that end before it.
    chunk = tl.program_id(0)
    row = 0
    first = 0
    total = 0
    for start in range(0, rows, BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        begin, count, before = _extent(r, r < rows, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
        of_row = tl.where(count > 0, (before + count + CHUNK - 1) // CHUNK, 0)
        end = total + tl.cumsum(of_row, 0)
        earlier = (r < rows) & (end <= chunk)
        row += tl.sum(earlier.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(earlier, end, 0), 0))
        total = tl.minimum(total + tl.sum(of_row, 0), 1 << 30)

    chunks += chunk * 3
    if row >= rows:  # there can be fewer chunks than programs
        tl.store(chunks, 0)
        tl.store(chunks + 1, 0)
        return
    begin, count, before = _extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    low = begin + tl.maximum((chunk - first) * CHUNK - before, 0)
    high = begin + tl.minimum((chunk - first + 1) * CHUNK - before, count)

    # 1: a state comes before the chunk; 0: none does, it is zero; -1: a padding row
    past = (chunk > first).to(tl.int32)
    past |= load_flag(row, has_initial_state, initial_stride).to(tl.int32)
    past = tl.where(load_slot(row, slots, slots_stride, null_slot, slot_count) < 0, -1, past)
    if tl.program_id(1) == 0:
        tl.store(chunks, low)
        tl.store(chunks + 1, high)
        tl.store(chunks + 2, past)
        if chunk == first:
            tl.store(first_chunks + row, chunk)
    if past < 0:
        return

    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    token = low + tl.arange(0, BLOCK_TOKENS)
    inside = (token < high)[:, None] & (head < HEADS)[None, :]
    d = tl.load(tile_ptrs(dt, token, dt_stride, head, False), inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        d += tl.load(dt_bias + head, head < HEADS, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        d = softplus(d)
    d = tl.where(inside, tl.minimum(tl.maximum(d, dt_min), dt_max), 0.0)
    rate = tl.load(A + head, head < HEADS, other=0.0).to(tl.float32) * 1.4426950408889634
    log_decay = d * finite_rate(rate)[None, :]
    d = tl.where(log_decay == log_decay, d, log_decay)  # NaN stays NaN
    total, left = exact_sums(log_decay)
    near, up, down = split(total)

    # Planes: log2 of the decay since the chunk began, rounded; dt times `down`; dt decayed to the chunk's end; `up`.
    steps += head.to(tl.int64)[None, :] * tokens + token[:, None]
    plane = HEADS * tokens.to(tl.int64)
    tl.store(steps, near, inside)
    tl.store(steps + plane, d * down, inside)
    tl.store(steps + 2 * plane, tl.exp2(to_log2(left)) * d, inside)
    tl.store(steps + 3 * plane, up, inside)


@kernel(first_number="x_stride", static="steps first_chunks starts")
def _states(
    x,
    B,
    cu_seqlens,
    num_computed_tokens,
    slots,
    write_slots,
    has_initial_state,
    ssm_state,
    chunk_states,
    steps,
    first_chunks,
    starts,  # out: (chunks, heads, dim, dstate), the state before a chunk, for those that have a past
    x_stride,  # this and the next: from token to token
    B_stride,
    slots_stride,
    write_stride,
    initial_stride,
    computed_stride,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
    kept_stride,  # from chunk to chunk of chunk_states
    most,  # chunks that there can be; more have only rows of wrong cu_seqlens, which leave the rest out
    length,
    tokens,
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # Programs that run together read the same tokens: rows are outermost, then heads.
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    BLOCKS: tl.constexpr = DIM_BLOCKS * ((DSTATE + BLOCK_STATE - 1) // BLOCK_STATE)
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    program = tl.program_id(0)
    row = program // (BLOCKS * HEADS)
    head = program // BLOCKS % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = program % BLOCKS // DIM_BLOCKS * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    in_state = in_dim[:, None] & in_dstate[None, :]

    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        return
    begin, count, before = _extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)

    if ALIGNED:
        of_state = (head * DIM + channel)[:, None] * DSTATE + entry[None, :]
    else:
        of_state = channel.to(tl.int64)[:, None] * dim_stride + entry.to(tl.int64)[None, :] * dstate_stride
        of_state += head.to(tl.int64) * head_stride
    carried = load_flag(row, has_initial_state, initial_stride)
    initial = offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state
    s = tl.load(initial, in_state & carried, other=0.0).to(tl.float32)

    if count > 0:
        chunk = within(tl.load(first_chunks + row), most - 1).to(tl.int64)
        in_head = channel[:, None] * DSTATE + entry[None, :]
        starts += (chunk * HEADS + head) * (DIM * DSTATE)
        if chunk_states is not None:
            chunk_states += chunk * kept_stride + head * (DIM * DSTATE)
        x += head * DIM
        B += head // (HEADS // GROUPS) * DSTATE
        decay = steps + head.to(tl.int64) * tokens + begin
        weight = decay + 2 * HEADS * tokens.to(tl.int64)

        last = tl.minimum((before + count - 1) // CHUNK, most - 1 - chunk.to(tl.int32))
        left = tl.minimum(before + count - last * CHUNK, CHUNK)
        blocks = last * PER_CHUNK + (left + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        for block in range(blocks):
            number = block // PER_CHUNK
            low = number * CHUNK - before
            high = tl.minimum(low + CHUNK, count)
            if block % PER_CHUNK == 0:
                if carried | (number > 0):
                    tl.store(starts + number.to(tl.int64) * (HEADS * DIM * DSTATE) + in_head, s, in_state)
                if chunk_states is not None:
                    if number > 0:
                        tl.store(chunk_states + (number - 1).to(tl.int64) * kept_stride + in_head, s, in_state)
                s *= tl.exp2(tl.load(decay + high - 1))
            t = low + block % PER_CHUNK * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            inside = (t >= 0) & (t < high)
            x_ptrs = tile_ptrs(x, begin + t, x_stride, channel, ALIGNED)
            B_ptrs = tile_ptrs(B, begin + t, B_stride, entry, ALIGNED)
            u = tl.load(x_ptrs, inside[:, None] & in_dim[None, :], other=0.0)
            b = tl.load(B_ptrs, inside[:, None] & in_dstate[None, :], other=0.0)
            w = tl.load(weight + t, inside, other=0.0)
            b = b.to(tl.float32) * w[:, None]
            operand = starts.dtype.element_ty
            s = tl.dot(tl.trans(u.to(operand)), b.to(operand), s, input_precision="ieee")
        if chunk_states is not None:
            tl.store(chunk_states + last.to(tl.int64) * kept_stride + in_head, s, in_state)

    target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
    stored &= slot_stride >= 0
    tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)


@kernel(first_number="x_stride", static="steps chunks starts")
def _outputs(
    x,
    B,
    C,
    D,
    z,
    output,
    steps,
    chunks,
    starts,
    x_stride,  # this and the next four: from token to token
    B_stride,
    C_stride,
    z_stride,
    output_stride,
    tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # of output
    BLOCK_PAST: tl.constexpr,  # of the tokens that they read
):
    # Programs that run together read the same chunk; those with the most to read come first.
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    BLOCKS: tl.constexpr = (CHUNK + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    program = tl.program_id(0)
    chunk = (program // (BLOCKS * DIM_BLOCKS * HEADS)).to(tl.int64)
    head = program // (BLOCKS * DIM_BLOCKS) % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE

    begin = tl.load(chunks + chunk * 3)
    end = tl.load(chunks + chunk * 3 + 1)
    first = begin + (BLOCKS - 1 - program // DIM_BLOCKS % BLOCKS) * BLOCK_TOKENS
    if first >= end:
        return
    past = tl.load(chunks + chunk * 3 + 2)
    token = first + tl.arange(0, BLOCK_TOKENS)
    inside = token < end
    written = inside[:, None] & in_dim[None, :]
    output = tile_ptrs(output + head * DIM, token, output_stride, channel, ALIGNED)
    if past < 0:
        tl.store(output, tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32), written)
        return

    operand = starts.dtype.element_ty
    x += head * DIM
    B += head // (HEADS // GROUPS) * DSTATE
    C += head // (HEADS // GROUPS) * DSTATE
    decays = steps + head.to(tl.int64) * tokens
    sizes = decays + HEADS * tokens.to(tl.int64)
    decay = tl.load(decays + token, inside, other=float("-inf"))
    up = tl.load(sizes + 2 * HEADS * tokens.to(tl.int64) + token, inside, other=0.0)
    C_ptrs = tile_ptrs(C, token, C_stride, entry, ALIGNED)
    c = tl.load(C_ptrs, inside[:, None] & in_dstate[None, :], other=0.0).to(operand)

    y = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    if past > 0:
        starts += (chunk * HEADS + head) * (DIM * DSTATE)
        start_ptrs = tile_ptrs(starts, channel, DSTATE, entry, ALIGNED)
        s = tl.load(start_ptrs, in_dim[:, None] & in_dstate[None, :], other=0.0)
        y = tl.dot(c, tl.trans(s), input_precision="ieee") * tl.exp2(decay)[:, None]
    for start in range(begin, tl.minimum(first + BLOCK_TOKENS, end), BLOCK_PAST):
        t = start + tl.arange(0, BLOCK_PAST)
        there = t < end
        x_ptrs = tile_ptrs(x, t, x_stride, channel, ALIGNED)
        B_ptrs = tile_ptrs(B, t, B_stride, entry, ALIGNED)
        b = tl.load(B_ptrs, there[:, None] & in_dstate[None, :], other=0.0).to(operand)
        u = tl.load(x_ptrs, there[:, None] & in_dim[None, :], other=0.0).to(operand)
        w = decay[:, None] - tl.load(decays + t, there, other=0.0)[None, :]
        w = tl.exp2(tl.where(token[:, None] >= t[None, :], w, float("-inf")))
        w *= tl.load(sizes + t, there, other=0.0)[None, :]
        w *= tl.dot(c, tl.trans(b), input_precision="ieee")
        y = tl.dot(w.to(operand), u, y, input_precision="ieee")

    y *= up[:, None]
    if D is not None:
        u = tl.load(tile_ptrs(x, token, x_stride, channel, ALIGNED), written, other=0.0).to(tl.float32)
        if D_PER_CHANNEL:
            y += u * tl.load(D + head * DIM + channel, in_dim, other=0.0).to(tl.float32)[None, :]
        else:
            y += u * tl.load(D + head).to(tl.float32)
    if z is not None:
        gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), written, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(output, y, written)
