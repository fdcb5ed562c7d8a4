"""Mamba-3's recurrence with one input and output a head over whole sequences, chunk by chunk, in five launches.

The product of token s counts for a later one by w[s] = early[s] + late[s + 1], times the decay between them, where late
is 0 after the row's last token; for its own token by early[s] alone. So a chunk is one of Mamba-2's but for the
diagonal of its weights. Nothing is divided, and values are multiplied as they are.

What turns k and q is a sum over all tokens of a row before. It is summed as whole numbers, in units of 2^-40 half
turns: exact, in any order. `_turns` sums every chunk's, `_begin` all before each chunk, and `_rotate` turns k and q.
`_weigh` finds how a chunk's queries read its values: apart from `_rotate`, whose registers are full. `_scan` walks over
the chunks of a row with one head's state in registers.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    chunk_bounds,
    kernel,
    load_flag,
    load_slot,
    row_chunks,
    tile_ptrs,
    to_be_multiplied,
)
from mamba_ops.ops._triton.decay import exact_sums, split, to_log2
from mamba_ops.ops._triton.mamba3 import half_turns, log_decay, sin_cos

_ONE: tl.constexpr = tl.constexpr(2.0**40)
_WHOLE: tl.constexpr = tl.constexpr(2**41)  # a turn, in units
_HALF: tl.constexpr = tl.constexpr(2**40)
_NAN: tl.constexpr = tl.constexpr(2**52)  # stands for NaN; so does every number beyond half of it
_PI: tl.constexpr = tl.constexpr(3.141592653589793)


@triton.jit
def _units(turn):
    # Half turns, at most a whole turn of them, as a whole number.
    is_nan = turn != turn
    return tl.where(is_nan, _NAN, (tl.where(is_nan, 0.0, turn) * _ONE).to(tl.int64))


@triton.jit
def _without_turns(total):
    # Less whole turns: within half a turn of zero; NaN stays what stands for it.
    return tl.where(total > _NAN // 2, _NAN, ((total + _HALF) & (_WHOLE - 1)) - _HALF)


@triton.jit
def _turns_of(angles, dt, t, there, angles_stride, dt_stride, pair, is_angle, head):
    # By how much each of a chunk's tokens turns each pair.
    raw = tl.load(tile_ptrs(angles, t, angles_stride, pair, False), there[:, None] & is_angle[None, :], other=0.0)
    d = tl.load(dt + head + t.to(tl.int64) * dt_stride, there, other=0.0).to(tl.float32)
    return _units(half_turns(raw.to(tl.float32), d[:, None]))


@kernel(first_number="dt_stride", static="turns")
def _turns(
    dt,
    angles,
    cu_seqlens,
    turns,  # out: (chunks, heads, HALF), by how much a chunk turns each pair
    dt_stride,
    angles_stride,
    length,  # tokens of every row; with cu_seqlens of all of them together
    rows,
    HEADS: tl.constexpr,
    ANGLES: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program // HEADS
    head = program % HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    pair = tl.arange(0, HALF)
    t = low + tl.arange(0, CHUNK)
    steps = _turns_of(angles, dt, t, t < high, angles_stride, dt_stride, pair, pair < ANGLES, head)
    tl.store(turns + (chunk.to(tl.int64) * HEADS + head) * HALF + pair, _without_turns(tl.sum(steps, 0)))


@kernel(first_number="angle_stride", static="turns starts before")
def _begin(
    angle_state,
    k_state,
    cu_seqlens,
    slots,
    has_initial_state,
    turns,
    starts,  # out: (chunks, heads, HALF), by how much pairs are turned where a chunk begins
    before,  # out: (rows, heads, DSTATE), k_state of rows that go on, which `_scan` overwrites in some of its programs
    angle_stride,
    angle_head_stride,
    angle_pair_stride,
    k_stride,
    k_head_stride,
    k_entry_stride,
    slots_stride,
    initial_stride,
    length,
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DSTATE: tl.constexpr,
    ANGLES: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    FLOAT16: tl.constexpr,
):
    program = tl.program_id(0)
    row = program // HEADS
    head = program % HEADS
    first, chunks, _, _ = row_chunks(row, tl.num_programs(0) // HEADS, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        return
    pair = tl.arange(0, HALF)
    entry = tl.arange(0, 2 * HALF)
    goes_on = load_flag(row, has_initial_state, initial_stride)
    in_k = (entry < DSTATE) & goes_on
    of_k = head.to(tl.int64) * k_head_stride + entry.to(tl.int64) * k_entry_stride
    k = tl.load(k_state + source * k_stride + of_k, in_k, other=0.0)
    if FLOAT16:
        k = k.to(tl.float16)
    tl.store(before + (row.to(tl.int64) * HEADS + head) * DSTATE + entry, k, in_k)
    carried = (pair < ANGLES) & goes_on
    of_angle = head.to(tl.int64) * angle_head_stride + pair.to(tl.int64) * angle_pair_stride
    angle = tl.load(angle_state + source * angle_stride + of_angle, carried, other=0.0).to(tl.float32) * (1 / _PI)
    total = _units(angle - 2.0 * tl.floor(angle * 0.5 + 0.5))
    place = tl.arange(0, BLOCK_CHUNKS)
    for low in range(0, chunks, BLOCK_CHUNKS):
        number = low + place
        at = ((first + number).to(tl.int64) * HEADS + head)[:, None] * HALF + pair[None, :]
        inside = (number < chunks)[:, None]
        steps = tl.load(turns + at, inside, other=0)
        tl.store(starts + at, _without_turns(total[None, :] + (tl.cumsum(steps, 0) - steps)), inside)
        total = _without_turns(total + tl.sum(steps, 0))


@triton.jit
def _turned(vectors, bias, sine, cosine, CHUNK: tl.constexpr, HALF: tl.constexpr):
    # The tokens' vectors with a bias, turned by the sines and cosines of their pairs.
    vectors = vectors.to(tl.float32)
    if bias is not None:
        vectors += bias[None, :]
    first, second = tl.split(tl.reshape(vectors, [CHUNK, HALF, 2]))
    pairs = tl.join(first * cosine - second * sine, first * sine + second * cosine)
    return tl.reshape(pairs, [CHUNK, 2 * HALF])


@kernel(first_number="dt_stride", static="B_bias C_bias starts keys queries last_angle last_k")
def _rotate(
    dt,
    angles,
    B,
    C,
    B_bias,
    C_bias,
    cu_seqlens,
    slots,
    starts,
    keys,  # out: (chunks, heads, CHUNK, DSTATE), turned; in the dtype in which they are multiplied
    queries,  # out: the same
    last_angle,  # out: (rows, heads, ANGLES), of each row's last token
    last_k,  # out: (rows, heads, DSTATE)
    dt_stride,
    angles_stride,
    B_stride,
    C_stride,
    slots_stride,
    length,
    rows,
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    ANGLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    FLOAT16: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program // HEADS
    head = program % HEADS
    row, low, high, _, is_last = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    i = tl.arange(0, CHUNK)
    t = low + i
    there = t < high
    pair = tl.arange(0, HALF)
    entry = tl.arange(0, 2 * HALF)
    in_dstate = entry < DSTATE
    number = chunk.to(tl.int64) * HEADS + head
    operand = keys.dtype.element_ty

    steps = _turns_of(angles, dt, t, there, angles_stride, dt_stride, pair, pair < ANGLES, head)
    total = _without_turns(tl.load(starts + number * HALF + pair)[None, :] + tl.cumsum(steps, 0))
    angle = tl.where(total > _NAN // 2, float("nan"), total.to(tl.float32) * (_PI / _ONE))
    sine, cosine = sin_cos(angle)

    of_group = head // (HEADS // GROUPS) * DSTATE
    read = there[:, None] & in_dstate[None, :]
    k = tl.load(tile_ptrs(B + of_group, t, B_stride, entry, ALIGNED), read, other=0.0)
    q = tl.load(tile_ptrs(C + of_group, t, C_stride, entry, ALIGNED), read, other=0.0)
    more_k = None
    more_q = None
    if B_bias is not None:
        more_k = tl.load(B_bias + head * DSTATE + entry, in_dstate, other=0.0).to(tl.float32)
    if C_bias is not None:
        more_q = tl.load(C_bias + head * DSTATE + entry, in_dstate, other=0.0).to(tl.float32)
    k = _turned(k, more_k, sine, cosine, CHUNK, HALF)
    q = _turned(q, more_q, sine, cosine, CHUNK, HALF)
    ends = (t == high - 1) & is_last  # the row
    of_row = row.to(tl.int64) * HEADS + head
    place = tl.zeros([CHUNK], tl.int64)[:, None]
    tl.store(last_angle + of_row * ANGLES + place + pair[None, :], angle, ends[:, None] & (pair < ANGLES)[None, :])
    tl.store(last_k + of_row * DSTATE + place + entry[None, :], k, ends[:, None] & in_dstate[None, :])
    if FLOAT16:
        k = k.to(tl.float16)
        q = q.to(tl.float16)
    k = k.to(operand)
    q = q.to(operand)
    at = number * (CHUNK * DSTATE) + i[:, None] * DSTATE + entry[None, :]
    tl.store(keys + at, k, read)
    tl.store(queries + at, q, read)


@kernel(first_number="dt_stride", static="keys queries factors weights")
def _weigh(
    dt,
    A,
    trap,
    cu_seqlens,
    slots,
    keys,
    queries,
    factors,  # out: (chunks, heads, 4, CHUNK), of queries, of values that are kept; the chunk's decay; late
    weights,  # out: (chunks, heads, CHUNK, CHUNK), how queries read each value
    dt_stride,
    A_stride,
    trap_stride,
    slots_stride,
    length,
    rows,
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    chunk = program // HEADS
    head = program % HEADS
    row, low, high, _, is_last = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    i = tl.arange(0, CHUNK)
    t = low + i
    there = t < high
    entry = tl.arange(0, 2 * HALF)
    number = chunk.to(tl.int64) * HEADS + head
    at = number * (CHUNK * DSTATE) + i[:, None] * DSTATE + entry[None, :]
    read = there[:, None] & (entry < DSTATE)[None, :]
    k = tl.load(keys + at, read, other=0.0)
    q = tl.load(queries + at, read, other=0.0)

    # What goes to a token's own product, and what the next one gives to it.
    end = high
    if not is_last:
        end = high + 1
    after = t + 1 < end
    at_t = t.to(tl.int64)
    d = tl.load(dt + head + at_t * dt_stride, there, other=0.0).to(tl.float32)
    share = tl.load(trap + head + at_t * trap_stride, there, other=0.0).to(tl.float32)
    next_d = tl.load(dt + head + (at_t + 1) * dt_stride, after, other=0.0).to(tl.float32)
    next_share = tl.load(trap + head + (at_t + 1) * trap_stride, after, other=0.0).to(tl.float32)
    rate = tl.load(A + head + at_t * A_stride, there, other=0.0).to(tl.float32)
    early = tl.sigmoid(share) * d
    weight = early + tl.sigmoid(-next_share) * next_d

    decay = log_decay(rate, d) * 1.4426950408889634
    sums, left = exact_sums(decay)
    near, up, down = split(sums)
    factors += number * (4 * CHUNK)
    tl.store(factors + i, tl.where(decay == decay, tl.exp2(to_log2(sums)), decay))  # NaN stays NaN
    tl.store(factors + CHUNK + i, tl.exp2(to_log2(left)) * weight)
    tl.store(factors + 2 * CHUNK + i, tl.exp2(to_log2(sums + left)), i == 0)  # all of them
    tl.store(factors + 3 * CHUNK + i, tl.sigmoid(-share) * d)
    between = tl.exp2(tl.where(i[:, None] >= i[None, :], near[:, None] - near[None, :], float("-inf")))
    between *= tl.where(i[:, None] == i[None, :], early[None, :], weight[None, :]) * (up[:, None] * down[None, :])
    product = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    at = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    tl.store(weights + at, to_be_multiplied(product * between, PRECISION))
