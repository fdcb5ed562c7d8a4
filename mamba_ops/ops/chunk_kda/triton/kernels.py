"""Kimi Delta Attention over whole sequences, chunk by chunk, in three launches.

Every channel of a key decays by itself, so what two tokens keep of each other is a sum over channels. `_pairs` finds it
for all chunks at once, a part of 16 tokens to a program. `_solve` inverts the chunks' systems, and finds what tokens
write if the state before is zero, and what to subtract for each state. `_scan` walks over the chunks of a row with some
rows of one head's state in registers, and writes the outputs.

Exponents are sums of the logs of tokens' decays, never differences of two sums, so decays of any strength are exact.
From token j to token i of a later part they are split where that part begins: neither is positive. In one part they
are summed pair by pair; where the part's whole decay is moderate, they are split there too, and one is positive.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    chunk_bounds,
    final_slot,
    kernel,
    load_flag,
    load_slot,
    offset_ptr,
    row_chunks,
    tile_ptrs,
)
from mamba_ops.ops._triton.delta_rule import _PART, inverse_of, length_factor

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def load_decays(g, t, first, end, stride, key, in_key, ALIGNED: tl.constexpr):
    # The binary logs of decays of tokens t, zero where they are not from `first` up to `end`.
    there = ((t >= first) & (t < end))[:, None] & in_key[None, :]
    return tl.load(tile_ptrs(g, t, stride, key, ALIGNED), there, other=0.0).to(tl.float32) * _LOG2_E


@triton.jit
def until_part(g, first, low, high, between, stride, key, in_key, ALIGNED: tl.constexpr):
    # Of a part's tokens, from `first` on: the decay from each until the part begins before which the logs of whole
    # parts are `between`; and those with this part's own.
    t = first + tl.arange(0, _PART)
    later = load_decays(g, t + 1, low, tl.minimum(first + _PART, high), stride, key, in_key, ALIGNED)
    opener = tl.load(g + first.to(tl.int64) * stride + key, in_key & (first < high), other=0.0).to(tl.float32) * _LOG2_E
    decay = tl.exp2(tl.cumsum(later, 0, reverse=True) + between[None, :])
    return decay, between + (tl.sum(later, 0) + opener)


@kernel(first_number="scale", static="factors system weights")
def _pairs(
    q,
    k,
    g,
    cu_seqlens,
    slots,
    factors,  # out: (chunks, v_heads, 2, CHUNK), that give keys and queries their lengths
    system,  # out: (chunks, v_heads, CHUNK, CHUNK), decayed products of keys; only below the diagonal
    weights,  # out: likewise, how strength queries read of what each token writes; zero above the diagonal
    scale,
    q_stride,  # this and the next two: from token to token
    k_stride,
    g_stride,
    slots_stride,
    length,  # tokens of every row; with cu_seqlens of all of them together
    rows,
    null_slot,
    slot_count,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    L2NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODERATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PARTS: tl.constexpr = CHUNK // _PART
    part = tl.program_id(0) % PARTS
    head = tl.program_id(0) // PARTS % V_HEADS
    chunk = tl.program_id(0) // PARTS // V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    begin = low + part * _PART
    if begin >= high:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    operand = weights.dtype.element_ty
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    g += head * K_DIM
    number = chunk.to(tl.int64) * V_HEADS + head
    key = tl.arange(0, BLOCK_K)
    in_key = key < K_DIM
    i = tl.arange(0, _PART)
    t = begin + i
    there = (t < high)[:, None] & in_key[None, :]
    keys = tl.load(tile_ptrs(k, t, k_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
    queries = tl.load(tile_ptrs(q, t, q_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
    of_key = length_factor(keys, L2NORM)
    of_query = length_factor(queries, L2NORM) * scale
    tl.store(factors + number * (2 * CHUNK) + part * _PART + i, of_key)
    tl.store(factors + number * (2 * CHUNK) + CHUNK + part * _PART + i, of_query)
    keys *= of_key[:, None]
    queries *= of_query[:, None]
    within = tl.cumsum(load_decays(g, t, low, high, g_stride, key, in_key, ALIGNED), 0)
    opened_k = (keys * tl.exp2(within)).to(operand)
    opened_q = (queries * tl.exp2(within)).to(operand)

    square = number * (CHUNK * CHUNK) + (part * _PART + i)[:, None] * CHUNK + i[None, :]
    between = tl.zeros([BLOCK_K], tl.float32)
    for back in range(part):
        other = part - 1 - back
        first = low + other * _PART
        s = first + i
        decay, between = until_part(g, first, low, high, between, g_stride, key, in_key, ALIGNED)
        given = tl.load(tile_ptrs(k, s, k_stride, key, ALIGNED), in_key[None, :], other=0.0).to(tl.float32)
        given = tl.trans((given * length_factor(given, L2NORM)[:, None] * decay).to(operand))
        tl.store(system + square + other * _PART, tl.dot(opened_k, given, input_precision=PRECISION))
        tl.store(weights + square + other * _PART, tl.dot(opened_q, given, input_precision=PRECISION))
    for other in range(part + 1, PARTS):
        tl.store(weights + square + other * _PART, tl.zeros([_PART, _PART], tl.float32))

    if tl.min(within) > -MODERATE:
        given = tl.trans((keys * tl.exp2(-within)).to(operand))
        known = tl.dot(opened_k, given, input_precision=PRECISION)
        weight = tl.dot(opened_q, given, input_precision=PRECISION)
    else:
        known = tl.zeros([_PART, _PART], tl.float32)
        weight = tl.zeros([_PART, _PART], tl.float32)
        exponents = tl.zeros([_PART, BLOCK_K], tl.float32)  # of token j to all after it
        for back in range(_PART):
            j = _PART - 1 - back
            token = (begin + j).to(tl.int64)
            later = in_key & (j < _PART - 1) & (token + 1 < high)
            later = tl.load(g + (token + 1) * g_stride + key, later, other=0.0).to(tl.float32) * _LOG2_E
            exponents = tl.where(i[:, None] > j, exponents + later[None, :], 0.0)
            given = tl.load(k + token * k_stride + key, in_key & (token < high), other=0.0).to(tl.float32)
            if L2NORM:
                given /= tl.sqrt(tl.sum(given * given, axis=0) + 1e-6)
            decayed = tl.exp2(tl.where(i[:, None] >= j, exponents, float("-inf"))) * given[None, :]
            at = i[None, :] == j
            known = tl.where(at, tl.sum(keys * decayed, axis=1)[:, None], known)
            weight = tl.where(at, tl.sum(queries * decayed, axis=1)[:, None], weight)
    tl.store(system + square + part * _PART, known)
    tl.store(weights + square + part * _PART, tl.where(i[:, None] >= i[None, :], weight, 0.0))


@kernel(first_number="k_stride", static="factors system keyed alone whole inverses")
def _solve(
    q,
    k,
    v,
    g,
    beta,
    cu_seqlens,
    slots,
    factors,
    system,
    keyed,  # out: (chunks, v_heads, 3, CHUNK, BLOCK_K), what tokens write less for the state before; queries; keys
    alone,  # out: (chunks, v_heads, CHUNK, V_PADDED), what tokens write if the state before is zero
    whole,  # out: (chunks, v_heads, BLOCK_K), what a chunk keeps of the state before
    inverses,  # out: (chunks, v_heads, CHUNK, CHUNK), of the systems; None: they are not kept
    k_stride,
    q_stride,  # this and the next three: from token to token
    v_stride,
    g_stride,
    beta_stride,
    slots_stride,
    length,
    rows,
    null_slot,
    slot_count,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    operand = keyed.dtype.element_ty
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    v += head * V_DIM
    g += head * K_DIM
    number = chunk.to(tl.int64) * V_HEADS + head
    i = tl.arange(0, CHUNK)
    t = low + i
    known = tl.load(
        system + number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :],
        (i[:, None] > i[None, :]) & (t < high)[:, None],
        other=0.0,
    )
    strength = tl.load(beta + head + t.to(tl.int64) * beta_stride, t < high, other=0.0).to(tl.float32)
    inverse = inverse_of(known * strength[:, None], CHUNK, PRECISION).to(operand)
    if inverses is not None:
        tl.store(inverses + number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :], inverse)

    alone += number * (CHUNK * V_PADDED)
    for start in range(0, V_PADDED, BLOCK):
        value = start + tl.arange(0, BLOCK)
        there = (t < high)[:, None] & (value < V_DIM)[None, :]
        values = tl.load(tile_ptrs(v, t, v_stride, value, ALIGNED), there, other=0.0).to(tl.float32)
        values = (values * strength[:, None]).to(operand)
        new = tl.dot(inverse, values, input_precision=EXACT)
        tl.store(alone + i[:, None] * V_PADDED + value[None, :], new)

    factors += number * (2 * CHUNK) + i
    of_key = tl.load(factors, t < high, other=0.0)
    of_query = tl.load(factors + CHUNK, t < high, other=0.0)
    keyed += number * (3 * CHUNK * BLOCK_K)
    for start in range(0, BLOCK_K, BLOCK):
        key = start + tl.arange(0, BLOCK)
        in_key = key < K_DIM
        there = (t < high)[:, None] & in_key[None, :]
        place = keyed + i[:, None] * BLOCK_K + key[None, :]
        total = tl.cumsum(load_decays(g, t, low, high, g_stride, key, in_key, ALIGNED), 0)
        tl.store(whole + number * BLOCK_K + key, tl.exp2(tl.sum(tl.where(i[:, None] == CHUNK - 1, total, 0.0), axis=0)))
        queries = tl.load(tile_ptrs(q, t, q_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
        tl.store(place + CHUNK * BLOCK_K, queries * of_query[:, None] * tl.exp2(total))
        keys = tl.load(tile_ptrs(k, t, k_stride, key, ALIGNED), there, other=0.0).to(tl.float32) * of_key[:, None]
        through = (keys * tl.exp2(total) * strength[:, None]).to(operand)
        tl.store(place, tl.dot(inverse, through, input_precision=EXACT))
        later = load_decays(g, t + 1, low, tl.minimum(low + CHUNK, high), g_stride, key, in_key, ALIGNED)
        tl.store(place + 2 * CHUNK * BLOCK_K, keys * tl.exp2(tl.cumsum(later, 0, reverse=True)))


@kernel(first_number="output_stride", static="keyed alone whole weights states written")
def _scan(
    cu_seqlens,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    output,  # None: neither outputs nor last states are stored
    keyed,
    alone,
    whole,
    weights,
    states,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), before each chunk; None: they are not kept
    written,  # out: (chunks, v_heads, CHUNK, V_PADDED), what tokens write; None likewise
    output_stride,
    slots_stride,
    write_stride,
    initial_stride,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    value_stride,
    key_stride,
    length,
    null_slot,
    slot_count,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS: tl.constexpr = V_PADDED // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    in_value = (value < V_DIM)[None, :]
    in_state = (value < V_DIM)[:, None] & (key < K_DIM)[None, :]

    if output is not None:
        output += head * V_DIM
    rows = tl.num_programs(0) // (BLOCKS * V_HEADS)
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        if output is not None:
            for number in range(chunks):
                t = begin + number * CHUNK + i
                place = tile_ptrs(output, t, output_stride, value, ALIGNED)
                tl.store(place, tl.zeros([CHUNK, BLOCK], tl.float32), (t < begin + count)[:, None] & in_value)
        return
    if ALIGNED:
        of_state = (head * V_DIM + value)[:, None] * K_DIM + key[None, :]
    else:
        of_state = value.to(tl.int64)[:, None] * value_stride + key.to(tl.int64)[None, :] * key_stride
        of_state += head.to(tl.int64) * head_stride
    if states is None:
        carried = in_state & load_flag(row, has_initial_state, initial_stride)
    else:  # for a backward pass: all rows have one, or none has
        carried = in_state & (slot_stride >= 0)
    s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, carried, other=0.0).to(tl.float32)

    operand = keyed.dtype.element_ty
    before = first.to(tl.int64) * V_HEADS + head
    keyed += before * (3 * CHUNK * BLOCK_K)
    alone += before * (CHUNK * V_PADDED)
    whole += before * BLOCK_K
    weights += before * (CHUNK * CHUNK)
    if states is not None:
        states += before * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
        written += before * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
    of_key = i[:, None] * BLOCK_K + key[None, :]
    for number in range(chunks):
        t = begin + number * CHUNK + i
        through = tl.load(keyed + of_key)
        keys = tl.load(keyed + 2 * CHUNK * BLOCK_K + of_key)
        new = tl.load(alone + i[:, None] * V_PADDED + value[None, :])
        decay = tl.load(whole + key)
        known = s.to(operand)
        if output is not None:
            queries = tl.load(keyed + CHUNK * BLOCK_K + of_key)
            weight = tl.load(weights + i[:, None] * CHUNK + i[None, :])
            y = tl.dot(known, tl.trans(queries), input_precision=PRECISION)
        new = tl.trans(new).to(tl.float32) - tl.dot(known, tl.trans(through), input_precision=PRECISION)
        new = new.to(operand)
        s = tl.dot(new, keys, s * decay[None, :], input_precision=PRECISION)
        if output is not None:
            y = tl.dot(new, tl.trans(weight), y, input_precision=PRECISION)
            there = (t < begin + count)[:, None] & in_value
            tl.store(tile_ptrs(output, t, output_stride, value, ALIGNED), tl.trans(y), there)
        if states is not None:
            tl.store(states, known)
            tl.store(written, tl.trans(new))
            states += V_HEADS * V_PADDED * BLOCK_K
            written += V_HEADS * CHUNK * V_PADDED
        keyed += V_HEADS * 3 * CHUNK * BLOCK_K
        alone += V_HEADS * CHUNK * V_PADDED
        whole += V_HEADS * BLOCK_K
        weights += V_HEADS * CHUNK * CHUNK

    if output is not None:
        target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
        stored &= slot_stride >= 0
        tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)
