"""Kimi Delta Attention over whole sequences, chunk by chunk, in three launches.

Every channel of a key decays by itself, so what two tokens keep of each other is a sum over channels. `_pairs` finds it
for all chunks at once, a part of 16 tokens to a program, and decays the part's keys and queries from the chunk's
beginning and to its end. `_solve` inverts the chunks' systems. `_scan` walks over the chunks of a row with some rows of
one head's state in registers, and writes the outputs.

Exponents are sums of the logs of tokens' decays, not differences of sums over a chunk, so decays of any strength are
exact. From token j to token i of a later part they are split where that part begins: neither is positive. In one part
they are split at half of the part's own decay, where that is moderate, and else summed pair by pair. Sums over 16
tokens are matrix products: the other matrix is of ones and zeros.
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
from mamba_ops.ops._triton.delta_rule import _PART, inverse_of, length_factor, load_numbers

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_NOTHING_LEFT: tl.constexpr = tl.constexpr(-16384.0)  # the log of a decay to zero: sums of it stay finite


@triton.jit
def load_decays(g, t, first, end, stride, key, in_key, ALIGNED: tl.constexpr):
    # The binary logs of decays of tokens t, zero where they are not from `first` up to `end`.
    there = ((t >= first) & (t < end))[:, None] & in_key[None, :]
    decays = tl.load(tile_ptrs(g, t, stride, key, ALIGNED), there, other=0.0).to(tl.float32) * _LOG2_E
    return tl.maximum(decays, _NOTHING_LEFT)


@triton.jit
def sums_of(chosen, decays, operand: tl.constexpr, PRECISION: tl.constexpr):
    # For every row of `chosen`, ones and zeros, the sum of those tokens' decays. In 16 bits they have two parts.
    if operand == tl.float32:
        sums = tl.dot(chosen.to(tl.float32), decays, input_precision=PRECISION)
    else:
        chosen = chosen.to(operand)
        rounded = decays.to(operand)
        rest = (decays - rounded.to(tl.float32)).to(operand)
        sums = tl.dot(chosen, rest, tl.dot(chosen, rounded))
    return sums


@kernel(first_number="scale", static="factors system weights keyed whole")
def _pairs(
    q,
    k,
    g,
    cu_seqlens,
    slots,
    factors,  # out: (chunks, v_heads, 2, CHUNK), that give keys and queries their lengths
    system,  # out: (chunks, v_heads, CHUNK, CHUNK), decayed products of keys; only below the diagonal
    weights,  # out: likewise, how strength queries read of what each token writes; zero above the diagonal
    keyed,  # out: (chunks, v_heads, 3, CHUNK, BLOCK_K), keys and queries decayed from the beginning, keys to the end
    whole,  # out: (chunks, v_heads, BLOCK_K), what a chunk keeps of the state before
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
    operand: tl.constexpr = weights.dtype.element_ty
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

    up_to = i[:, None] >= i[None, :]
    after = i[:, None] < i[None, :]
    every = tl.full([_PART, _PART], 1.0, tl.float32)
    own = load_decays(g, t, low, high, g_stride, key, in_key, ALIGNED)
    within = sums_of(up_to, own, operand, PRECISION)
    opened_k = (keys * tl.exp2(within)).to(operand)
    opened_q = (queries * tl.exp2(within)).to(operand)

    square = number * (CHUNK * CHUNK) + (part * _PART + i)[:, None] * CHUNK + i[None, :]
    before = tl.zeros([_PART, BLOCK_K], tl.float32)  # the same in all rows
    for back in range(part):
        other = part - 1 - back
        s = low + other * _PART + i
        decays = load_decays(g, s, low, high, g_stride, key, in_key, ALIGNED)
        given = tl.load(tile_ptrs(k, s, k_stride, key, ALIGNED), in_key[None, :], other=0.0).to(tl.float32)
        given *= length_factor(given, L2NORM)[:, None]
        given = tl.trans((given * tl.exp2(sums_of(after, decays, operand, PRECISION) + before)).to(operand))
        tl.store(system + square + other * _PART, tl.dot(opened_k, given, input_precision=PRECISION))
        tl.store(weights + square + other * _PART, tl.dot(opened_q, given, input_precision=PRECISION))
        before += sums_of(every, decays, operand, PRECISION)
    later = tl.zeros([_PART, BLOCK_K], tl.float32)
    for other in range(part + 1, PARTS):
        tl.store(weights + square + other * _PART, tl.zeros([_PART, _PART], tl.float32))
        later += load_decays(g, low + other * _PART + i, low, high, g_stride, key, in_key, ALIGNED)
    later = sums_of(every, tl.maximum(later, _NOTHING_LEFT), operand, PRECISION)

    place = keyed + number * (3 * CHUNK * BLOCK_K) + (part * _PART + i)[:, None] * BLOCK_K + key[None, :]
    tl.store(place, keys * tl.exp2(before + within))
    tl.store(place + CHUNK * BLOCK_K, queries * tl.exp2(before + within))
    tl.store(place + 2 * CHUNK * BLOCK_K, keys * tl.exp2(sums_of(after, own, operand, PRECISION) + later))
    if part == 0:
        last = whole + number * BLOCK_K + key[None, :] + 0 * i[:, None]
        tl.store(last, tl.exp2(within + later), i[:, None] == _PART - 1)

    if tl.sum((within < -2.0 * MODERATE).to(tl.int32)) == 0:
        half = 0.5 * tl.sum(tl.where(i[:, None] == _PART - 1, within, 0.0), axis=0)[None, :]
        given = tl.trans((keys * tl.exp2(half - within)).to(operand))
        half = tl.exp2(within - half)
        known = tl.dot((keys * half).to(operand), given, input_precision=PRECISION)
        weight = tl.dot((queries * half).to(operand), given, input_precision=PRECISION)
    else:
        known = tl.zeros([_PART, _PART], tl.float32)
        weight = tl.zeros([_PART, _PART], tl.float32)
        exponents = tl.zeros([_PART, BLOCK_K], tl.float32)  # of token j to all after it
        for back in range(_PART):
            j = _PART - 1 - back
            token = (begin + j).to(tl.int64)
            next_one = in_key & (j < _PART - 1) & (token + 1 < high)
            next_one = tl.load(g + (token + 1) * g_stride + key, next_one, other=0.0).to(tl.float32) * _LOG2_E
            exponents = tl.where(i[:, None] > j, exponents + next_one[None, :], 0.0)
            its_key = tl.load(k + token * k_stride + key, in_key & (token < high), other=0.0).to(tl.float32)
            if L2NORM:
                its_key /= tl.sqrt(tl.sum(its_key * its_key, axis=0) + 1e-6)
            decayed = tl.exp2(tl.where(i[:, None] >= j, exponents, float("-inf"))) * its_key[None, :]
            at = i[None, :] == j
            known = tl.where(at, tl.sum(keys * decayed, axis=1)[:, None], known)
            weight = tl.where(at, tl.sum(queries * decayed, axis=1)[:, None], weight)
    tl.store(system + square + part * _PART, known)
    tl.store(weights + square + part * _PART, tl.where(up_to, weight, 0.0))


@kernel(first_number="beta_stride", static="system inverses")
def _solve(
    beta,
    cu_seqlens,
    slots,
    system,
    inverses,  # out: (chunks, v_heads, CHUNK, CHUNK), of the systems
    beta_stride,
    slots_stride,
    length,
    rows,
    null_slot,
    slot_count,
    V_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    i = tl.arange(0, CHUNK)
    square = (chunk.to(tl.int64) * V_HEADS + head) * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    known = tl.load(system + square, (i[:, None] > i[None, :]) & (low + i < high)[:, None], other=0.0)
    strength = load_numbers(beta, head, low + i, beta_stride, high)
    tl.store(inverses + square, inverse_of(known * strength[:, None], CHUNK, PRECISION))


@kernel(first_number="v_stride", static="keyed whole inverses weights states written")
def _scan(
    v,
    beta,
    cu_seqlens,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    output,  # None: neither outputs nor last states are stored
    keyed,
    whole,
    inverses,
    weights,
    states,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), before each chunk; None: they are not kept
    written,  # out: (chunks, v_heads, CHUNK, V_PADDED), what tokens write; None likewise
    v_stride,
    beta_stride,
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
    v += head * V_DIM
    keyed += before * (3 * CHUNK * BLOCK_K)
    whole += before * BLOCK_K
    inverses += before * (CHUNK * CHUNK)
    weights += before * (CHUNK * CHUNK)
    if states is not None:
        states += before * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
        written += before * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
    of_key = i[:, None] * BLOCK_K + key[None, :]
    for number in range(chunks):
        t = begin + number * CHUNK + i
        is_token = (t < begin + count)[:, None]
        through = tl.load(keyed + of_key, is_token, other=0.0)
        keys = tl.load(keyed + 2 * CHUNK * BLOCK_K + of_key, is_token, other=0.0)
        values = tl.load(tile_ptrs(v, t, v_stride, value, ALIGNED), is_token & in_value, other=0.0)
        inverse = tl.load(inverses + i[:, None] * CHUNK + i[None, :])
        strength = load_numbers(beta, head, t, beta_stride, begin + count)
        decay = tl.load(whole + key)
        known = s.to(operand)
        if output is not None:
            queries = tl.load(keyed + CHUNK * BLOCK_K + of_key, is_token, other=0.0)
            weight = tl.load(weights + i[:, None] * CHUNK + i[None, :])
            y = tl.dot(known, tl.trans(queries), input_precision=PRECISION)
        new = tl.trans(values).to(tl.float32) - tl.dot(known, tl.trans(through), input_precision=PRECISION)
        new = (new * strength[None, :]).to(operand)
        new = tl.dot(new, tl.trans(inverse), input_precision=PRECISION).to(operand)
        s = tl.dot(new, keys, s * decay[None, :], input_precision=PRECISION)
        if output is not None:
            y = tl.dot(new, tl.trans(weight), y, input_precision=PRECISION)
            tl.store(tile_ptrs(output, t, output_stride, value, ALIGNED), tl.trans(y), is_token & in_value)
        if states is not None:
            tl.store(states, known)
            tl.store(written, tl.trans(new))
            states += V_HEADS * V_PADDED * BLOCK_K
            written += V_HEADS * CHUNK * V_PADDED
        keyed += V_HEADS * 3 * CHUNK * BLOCK_K
        whole += V_HEADS * BLOCK_K
        inverses += V_HEADS * CHUNK * CHUNK
        weights += V_HEADS * CHUNK * CHUNK

    if output is not None:
        target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
        stored &= slot_stride >= 0
        tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)
