"""The Mamba-2 recurrence over whole sequences, in two or three launches.

`_steps` finds for pieces of 64 tokens what of its past each token keeps. `_scan` walks over the pieces of a segment of
a row, with a tile of one head's state in registers: of each piece it has what its tokens read of the state before them
and of each other, and then the state after them. Where a row has several segments, `_states` has walked over it before,
and left the state before each of them. On Hopper others do what the last two do, for heads of 64: see `hopper.py`.
Decays of any strength are exact, by the sums of `ops/_triton/decay.py`.
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
)
from mamba_ops.ops._triton.decay import exact_sums, finite_rate, split, to_log2
from mamba_ops.ops.mamba_chunk_scan.triton.pieces import (
    chunks_before,
    extent,
    first_piece,
    first_segment,
    first_start,
    numbers,
    piece_range,
    row_of,
)


@kernel(first_number="dt_stride", static="steps")
def _steps(
    dt,
    A,
    dt_bias,
    cu_seqlens,
    num_computed_tokens,
    slots,
    steps,  # out: (pieces, heads, 4, BLOCK_TOKENS), described where they are stored
    dt_stride,
    slots_stride,
    computed_stride,
    length,  # of a row; with cu_seqlens that of all rows together
    rows,
    extra,  # pieces of a row that are not whole, at most
    null_slot,
    slot_count,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    piece = tl.program_id(0)
    row, first = row_of(piece, rows, cu_seqlens, length, extra, CHUNK, PIECE, SEGMENT=None)
    if row < 0:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    begin, count, before = extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    own, last = numbers(before, count, CHUNK, PIECE)
    own += piece - first
    if (piece < first) | (own >= last):  # there are fewer pieces than programs
        return
    low, high = piece_range(own, before, count, CHUNK, PIECE)

    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    place = tl.arange(0, BLOCK_TOKENS)
    token = begin + low + place
    inside = (token < begin + high)[:, None] & (head < HEADS)[None, :]
    d = tl.load(tile_ptrs(dt, token, dt_stride, head, False), inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        d += tl.load(dt_bias + head, head < HEADS, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        d = softplus(d)
    d = tl.where(inside, tl.minimum(tl.maximum(d, dt_min), dt_max), 0.0)
    rate = tl.load(A + head, head < HEADS, other=0.0).to(tl.float32) * 1.4426950408889634
    log_decay = tl.where(inside, d * finite_rate(rate)[None, :], 0.0)
    d = tl.where(log_decay == log_decay, d, log_decay)  # NaN stays NaN
    total, left = exact_sums(log_decay)
    near, up, down = split(total)

    # Log2 of the decay since the piece began, rounded; dt times `down`; dt decayed to the piece's end; `up`. Places
    # after a piece's last token have those of steps of 0, so that nobody needs to mask them.
    # One store of all four: each store has its tile turned in shared memory first.
    parts = tl.join(tl.join(near, tl.exp2(to_log2(left)) * d), tl.join(d * down, up))
    bit = tl.arange(0, 2)
    steps += (piece.to(tl.int64) * HEADS + head)[None, :] * (4 * BLOCK_TOKENS) + place[:, None]
    places = steps[:, :, None, None] + (2 * bit[:, None] + bit[None, :])[None, None, :, :] * BLOCK_TOKENS
    tl.store(places, parts, (head < HEADS)[None, :, None, None])


@triton.jit
def _in_slot(
    head, channel, entry, head_stride, dim_stride, dstate_stride, DIM: tl.constexpr, DSTATE: tl.constexpr, ALIGNED
):
    # Where a tile of a head's state lies in a slot.
    if ALIGNED:
        return (head * DIM + channel)[:, None] * DSTATE + entry[None, :]
    else:
        place = channel.to(tl.int64)[:, None] * dim_stride + entry.to(tl.int64)[None, :] * dstate_stride
        return place + head.to(tl.int64) * head_stride


@kernel(first_number="x_stride", static="steps starts")
def _states(
    x,
    B,
    cu_seqlens,
    num_computed_tokens,
    slots,
    has_initial_state,
    ssm_state,
    steps,
    starts,  # out: (starts_count, heads, dim, dstate), the state before each one of rows that have several
    x_stride,  # this and the next: from token to token
    B_stride,
    slots_stride,
    initial_stride,
    computed_stride,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
    starts_count,  # that starts has; more have only rows of wrong cu_seqlens, which leave the rest out
    extra,  # pieces of a row that are not whole, at most
    length,
    pieces,  # that steps has
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # Programs that run together read the same tokens: rows are outermost, then heads.
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    BLOCKS: tl.constexpr = DIM_BLOCKS * ((DSTATE + BLOCK_STATE - 1) // BLOCK_STATE)
    program = tl.program_id(0)
    row = program // (BLOCKS * HEADS)
    head = program // BLOCKS % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = program % BLOCKS // DIM_BLOCKS * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    in_state = in_dim[:, None] & in_dstate[None, :]
    place = tl.arange(0, BLOCK_TOKENS)

    begin, count, before = extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    piece_number = first_piece(row, begin, extra, CHUNK, PIECE)
    first, last = numbers(before, count, CHUNK, PIECE)
    last = tl.minimum(last, first + pieces - piece_number)
    if (last - first <= SEGMENT) | (source < 0):
        return
    carried = load_flag(row, has_initial_state, initial_stride)
    initial = offset_ptr(ssm_state, source * slot_stride, ALIGNED)
    initial += _in_slot(head, channel, entry, head_stride, dim_stride, dstate_stride, DIM, DSTATE, ALIGNED)
    s = tl.load(initial, in_state & carried, other=0.0).to(tl.float32)

    start = first_start(piece_number, SEGMENT)
    starts += (start.to(tl.int64) * HEADS + head) * (DIM * DSTATE) + channel[:, None] * DSTATE + entry[None, :]
    tl.store(starts, s, in_state & (start < starts_count))
    x += head * DIM
    B += head // (HEADS // GROUPS) * DSTATE
    steps += (piece_number.to(tl.int64) * HEADS + head) * (4 * BLOCK_TOKENS)
    left = tl.load(steps + BLOCK_TOKENS - 1)
    for piece in range(first, first + (last - first - 1) // SEGMENT * SEGMENT):
        low, high = piece_range(piece, before, count, CHUNK, PIECE)
        t = low + place
        inside = t < high
        weight = tl.load(steps + 2 * BLOCK_TOKENS + place)
        steps += HEADS * 4 * BLOCK_TOKENS
        next_left = tl.load(steps + BLOCK_TOKENS - 1)  # of this row: its last piece is not walked over here
        x_ptrs = tile_ptrs(x, begin + t, x_stride, channel, ALIGNED)
        B_ptrs = tile_ptrs(B, begin + t, B_stride, entry, ALIGNED)
        u = tl.load(x_ptrs, inside[:, None] & in_dim[None, :], other=0.0)
        b = tl.load(B_ptrs, inside[:, None] & in_dstate[None, :], other=0.0)
        b = (b.to(tl.float32) * weight[:, None]).to(OPERAND)
        s = tl.dot(tl.trans(u.to(OPERAND)), b, s * tl.exp2(left), input_precision="ieee")
        left = next_left
        if (piece + 1 - first) % SEGMENT == 0:
            start += 1
            starts += HEADS * DIM * DSTATE
            tl.store(starts, s, in_state & (start < starts_count))


@kernel(first_number="x_stride", static="steps starts")
def _scan(
    x,
    B,
    C,
    D,
    z,
    output,
    steps,
    starts,  # read for rows of several segments alone
    cu_seqlens,
    num_computed_tokens,
    slots,
    write_slots,
    has_initial_state,
    ssm_state,
    chunk_states,
    x_stride,  # this and the next four: from token to token
    B_stride,
    C_stride,
    z_stride,
    output_stride,
    slots_stride,
    write_stride,
    initial_stride,
    computed_stride,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
    chunk_states_stride,  # from chunk to chunk of chunk_states
    chunk_states_count,  # that chunk_states has
    rows,
    starts_count,  # that starts has
    extra,  # pieces of a row that are not whole, at most
    length,
    pieces,  # that steps has
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    SEGMENT: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # Programs that run together read the same tokens: segments are outermost, then heads.
    PER_CHUNK: tl.constexpr = (CHUNK + PIECE - 1) // PIECE
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    program = tl.program_id(0)
    segment_number = program // (DIM_BLOCKS * HEADS)
    head = program // DIM_BLOCKS % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    in_state = in_dim[:, None] & in_dstate[None, :]
    place = tl.arange(0, BLOCK_TOKENS)

    row, piece_number = row_of(segment_number, rows, cu_seqlens, length, extra, CHUNK, PIECE, SEGMENT)
    if row < 0:
        return
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    begin, count, before = extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    segment = segment_number - first_segment(piece_number, row, SEGMENT)
    start = first_start(piece_number, SEGMENT) + segment
    first, last = numbers(before, count, CHUNK, PIECE)
    last = tl.minimum(last, first + pieces - piece_number)
    several = last - first > SEGMENT
    piece_number += segment * SEGMENT
    first += segment * SEGMENT
    if (segment < 0) | ((segment > 0) & (first >= last)):  # there are fewer segments than programs
        return
    is_last = first + SEGMENT >= last
    last = tl.minimum(last, first + SEGMENT)
    output += head * DIM
    if source < 0:
        for piece in range(first, last):
            low, high = piece_range(piece, before, count, CHUNK, PIECE)
            written = (low + place < high)[:, None] & in_dim[None, :]
            zeros = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
            tl.store(tile_ptrs(output, begin + low + place, output_stride, channel, ALIGNED), zeros, written)
        return

    in_slot = _in_slot(head, channel, entry, head_stride, dim_stride, dstate_stride, DIM, DSTATE, ALIGNED)
    in_head = channel[:, None] * DSTATE + entry[None, :]
    carried = load_flag(row, has_initial_state, initial_stride)
    initial = offset_ptr(ssm_state, source * slot_stride, ALIGNED) + in_slot
    s = tl.load(initial, in_state & (carried & (several == 0)), other=0.0).to(tl.float32)
    starts += (start.to(tl.int64) * HEADS + head) * (DIM * DSTATE)
    s += tl.load(starts + in_head, in_state & (several & (start < starts_count)), other=0.0)

    if chunk_states is not None:
        first_chunk = chunks_before(row, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
        chunk_states += head * (DIM * DSTATE)
    if D is not None:
        if D_PER_CHANNEL:
            skip = tl.load(D + head * DIM + channel, in_dim, other=0.0).to(tl.float32)[None, :]
        else:
            skip = tl.load(D + head).to(tl.float32)
    x += head * DIM
    B += head // (HEADS // GROUPS) * DSTATE
    C += head // (HEADS // GROUPS) * DSTATE
    steps += (piece_number.to(tl.int64) * HEADS + head) * (4 * BLOCK_TOKENS)
    ends = BLOCK_TOKENS - 1 + tl.zeros([BLOCK_DIM], tl.int32)  # one number for all channels, as they need it
    left = tl.load(steps + ends, first < last, other=0.0)
    for piece in range(first, last):
        low, high = piece_range(piece, before, count, CHUNK, PIECE)
        t = low + place
        inside = t < high
        token = begin + t
        written = inside[:, None] & in_dim[None, :]
        read = inside[:, None] & in_dstate[None, :]
        decay = tl.load(steps + place)
        size = tl.load(steps + BLOCK_TOKENS + place)
        weight = tl.load(steps + 2 * BLOCK_TOKENS + place)
        up = tl.load(steps + 3 * BLOCK_TOKENS + place)
        steps += HEADS * 4 * BLOCK_TOKENS
        next_left = tl.load(steps + ends, piece + 1 < last, other=0.0)
        c = tl.load(tile_ptrs(C, token, C_stride, entry, ALIGNED), read, other=0.0).to(OPERAND)
        b = tl.load(tile_ptrs(B, token, B_stride, entry, ALIGNED), read, other=0.0).to(OPERAND)
        u = tl.load(tile_ptrs(x, token, x_stride, channel, ALIGNED), written, other=0.0)

        y = tl.dot(c, tl.trans(s.to(OPERAND)), input_precision="ieee") * tl.exp2(decay)[:, None]
        w = tl.where(place[:, None] >= place[None, :], decay[:, None] - decay[None, :], float("-inf"))
        w = tl.exp2(w) * size[None, :] * tl.dot(c, tl.trans(b), input_precision="ieee")
        y = tl.dot(w.to(OPERAND), u.to(OPERAND), y, input_precision="ieee") * up[:, None]
        pushed = (u.to(tl.float32) * weight[:, None]).to(OPERAND)
        s = tl.dot(tl.trans(pushed), b, s * tl.exp2(left)[:, None], input_precision="ieee")
        left = next_left

        if D is not None:
            y += u.to(tl.float32) * skip
        if z is not None:
            z_ptrs = tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED)
            gate = tl.load(z_ptrs, written, other=0.0).to(tl.float32)
            y *= gate * tl.sigmoid(gate)
        tl.store(tile_ptrs(output, token, output_stride, channel, ALIGNED), y, written)
        if chunk_states is not None:
            number = first_chunk + piece // PER_CHUNK
            ended = ((piece + 1) % PER_CHUNK == 0) | (high == count)
            ended &= number < chunk_states_count
            tl.store(chunk_states + number.to(tl.int64) * chunk_states_stride + in_head, s, in_state & ended)

    if is_last & (slot_stride >= 0):
        target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
        tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + in_slot, s, in_state & stored)
