"""What tokens of a chunk keep of each other in Kimi Delta Attention, all chunks at once, in three launches.

Every channel of a key decays by itself, so what two tokens keep of each other is a sum over channels. A matrix product
finds it for all pairs if their decay is split into a factor of the later token and one of the earlier: at the chunk's
beginning, where what the chunk decays by is moderate. `_decay` has these factors in keys and queries, and `_pairs`
multiplies. `_steep_pairs` is for blocks of channels that decay by more: it halves the chunk until they do not. From a
token of the first half to one of the second the decay is split between the halves, and neither factor is above 1.
Exponents are sums of the logs of tokens' decays, not differences of sums over a chunk, so decays of any strength are
exact. Sums over pieces that differ by token are matrix products, too, with a matrix of ones and zeros.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, load_slot, tile_ptrs

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_NOTHING_LEFT: tl.constexpr = tl.constexpr(-16384.0)  # the log of a decay to zero: sums of it stay finite


@triton.jit
def load_decays(g, t, first, end, stride, key, in_key, ALIGNED: tl.constexpr):
    # The binary logs of decays of tokens t, zero where they are not from `first` up to `end`.
    there = ((t >= first) & (t < end))[:, None] & in_key[None, :]
    decays = tl.load(tile_ptrs(g, t, stride, key, ALIGNED), there, other=0.0).to(tl.float32) * _LOG2_E
    return tl.where(decays < _NOTHING_LEFT, _NOTHING_LEFT, decays)  # NaN stays


@triton.jit
def sums_of(chosen, decays, operand: tl.constexpr, PRECISION: tl.constexpr):
    # For every row of `chosen`, the sum of those tokens' decays. In 16 bits they have two parts.
    chosen = tl.where(chosen, 1.0, 0.0).to(operand)
    if operand == tl.float32:
        sums = tl.dot(chosen, decays, input_precision=PRECISION)
    else:
        rounded = decays.to(operand)
        rest = (decays - rounded.to(tl.float32)).to(operand)
        sums = tl.dot(chosen, rest, tl.dot(chosen, rounded))
    return sums


@triton.jit
def decays_by_more(since, SPAN: tl.constexpr):
    # Whether any log is below -SPAN; NaN is not.
    return tl.max((since < -SPAN).to(tl.int32)) > 0


@triton.jit
def products_of(keys, queries, reading, given, is_pair, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    # Of pairs alone: keys and queries that read, decayed by `reading`, with keys that are read, decayed by `given`.
    turned = tl.trans((keys * given).to(OPERAND))
    of_keys = tl.dot((keys * reading).to(OPERAND), turned, input_precision=PRECISION)
    of_queries = tl.dot((queries * reading).to(OPERAND), turned, input_precision=PRECISION)
    return tl.where(is_pair, of_keys, 0.0), tl.where(is_pair, of_queries, 0.0)


@kernel(first_number="scale", static="factors steep keyed whole")
def _decay(
    q,
    k,
    g,
    cu_seqlens,
    slots,
    factors,  # out: (chunks, v_heads, 2, CHUNK), that give keys and queries their lengths
    steep,  # out: (chunks, v_heads), a bit for every block of channels that decays by more than SPAN; -1: no chunk
    keyed,  # out: (chunks, v_heads, 4, CHUNK, BLOCK_K), keys and queries decayed from the beginning, keys to the end,
    # and keys divided by their decay from the beginning, zero where that is steep
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
    BLOCK: tl.constexpr,  # channels at a time
    SPAN: tl.constexpr,  # binary logs
):
    head = tl.program_id(0) % V_HEADS
    chunk = tl.program_id(0) // V_HEADS
    number = chunk.to(tl.int64) * V_HEADS + head
    tl.store(steep + number, -1)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    g += head * K_DIM
    i = tl.arange(0, CHUNK)
    t = low + i
    of_key = tl.full([CHUNK], 1.0, tl.float32)
    of_query = tl.full([CHUNK], 1.0, tl.float32)
    if L2NORM:
        key_squares = tl.zeros([CHUNK, BLOCK], tl.float32)
        query_squares = tl.zeros([CHUNK, BLOCK], tl.float32)
        for first in tl.static_range(0, BLOCK_K, BLOCK):
            key = first + tl.arange(0, BLOCK)
            there = (t < high)[:, None] & (key < K_DIM)[None, :]
            keys = tl.load(tile_ptrs(k, t, k_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
            queries = tl.load(tile_ptrs(q, t, q_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
            key_squares += keys * keys
            query_squares += queries * queries
        of_key /= tl.sqrt(tl.sum(key_squares, axis=1) + 1e-6)
        of_query /= tl.sqrt(tl.sum(query_squares, axis=1) + 1e-6)
    of_query *= scale
    tl.store(factors + number * (2 * CHUNK) + i, of_key)
    tl.store(factors + number * (2 * CHUNK) + CHUNK + i, of_query)

    keyed += number * (4 * CHUNK * BLOCK_K)
    whole += number * BLOCK_K
    blocks = tl.full([], 0, tl.int32)
    for first in range(0, BLOCK_K, BLOCK):
        key = first + tl.arange(0, BLOCK)
        in_key = key < K_DIM
        there = (t < high)[:, None] & in_key[None, :]
        keys = tl.load(tile_ptrs(k, t, k_stride, key, ALIGNED), there, other=0.0) * of_key[:, None]
        queries = tl.load(tile_ptrs(q, t, q_stride, key, ALIGNED), there, other=0.0) * of_query[:, None]
        since = tl.cumsum(load_decays(g, t, low, high, g_stride, key, in_key, ALIGNED), axis=0)
        later = load_decays(g, t + 1, low, tl.minimum(high, low + CHUNK), g_stride, key, in_key, ALIGNED)
        left = tl.cumsum(later, axis=0, reverse=True)
        place = keyed + i[:, None] * BLOCK_K + key[None, :]
        opened = tl.exp2(since)
        tl.store(place, keys * opened)
        tl.store(place + CHUNK * BLOCK_K, queries * opened)
        tl.store(place + 2 * CHUNK * BLOCK_K, keys * tl.exp2(left))
        tl.store(whole + key[None, :] + 0 * i[:, None], opened, i[:, None] == CHUNK - 1)
        is_steep = decays_by_more(since, SPAN)
        blocks |= is_steep.to(tl.int32) << (first // BLOCK)
        undone = tl.where(is_steep, float("-inf"), -since)
        tl.store(place + 3 * CHUNK * BLOCK_K, keys * tl.exp2(undone))
    tl.store(steep + number, blocks)


@kernel(first_number="q_stride", static="factors steep system")
def _steep_pairs(
    q,
    k,
    g,
    cu_seqlens,
    factors,
    steep,
    system,  # out: (chunks, v_heads, CHUNK, CHUNK), of steep blocks of channels alone: what `_pairs` leaves there, and
    # turned round, on the diagonal and above it, what it leaves in `weights`
    q_stride,
    k_stride,
    g_stride,
    length,
    rows,
    count,  # of chunks and heads
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # as in `_decay`
    SPAN: tl.constexpr,  # likewise
    PRECISION: tl.constexpr,
    OPERAND: tl.constexpr,
    TOGETHER: tl.constexpr,  # of chunks and heads, as few have steep decays
):
    BITS: tl.constexpr = 6
    tl.static_assert(CHUNK == 1 << BITS)
    begin = tl.program_id(0) * TOGETHER
    numbers = begin + tl.arange(0, TOGETHER)
    if tl.max(tl.load(steep + numbers, numbers < count, other=-1), axis=0) <= 0:
        return
    i = tl.arange(0, CHUNK)
    # Two tokens are in one block of 2^bits if apart >> bits is 0, and in the halves of one of twice that if it is 1; it
    # is negative where the second token is the later one.
    apart = i[:, None] ^ i[None, :]
    apart = tl.where(i[:, None] >= i[None, :], apart, ~apart)
    # Steep blocks are found by loops: triton-xpu 3.3.0b1 refuses calls in a branch in a loop.
    for nth in range(TOGETHER):
        number = begin + nth
        blocks = tl.load(steep + number, number < count, other=-1)
        known = tl.zeros([CHUNK, CHUNK], tl.float32)
        weight = tl.zeros([CHUNK, CHUNK], tl.float32)
        remaining = blocks
        first = 0
        while remaining > 0:
            while remaining & 1 == 0:
                remaining >>= 1
                first += BLOCK
            head = number % V_HEADS
            _, low, high, _, _ = chunk_bounds(number // V_HEADS, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
            t = low + i
            key = first + tl.arange(0, BLOCK)
            in_key = key < K_DIM
            there = (t < high)[:, None] & in_key[None, :]
            of_head = head // (V_HEADS // K_HEADS) * K_DIM
            of_chunk = factors + number.to(tl.int64) * (2 * CHUNK)
            keys = tl.load(tile_ptrs(k + of_head, t, k_stride, key, ALIGNED), there, other=0.0)
            keys = keys * tl.load(of_chunk + i)[:, None]
            queries = tl.load(tile_ptrs(q + of_head, t, q_stride, key, ALIGNED), there, other=0.0)
            queries = queries * tl.load(of_chunk + CHUNK + i)[:, None]
            decays = load_decays(g + head * K_DIM, t, low, high, g_stride, key, in_key, ALIGNED)
            since = tl.cumsum(decays, axis=0)
            bits = BITS
            # Halves the chunk, then its halves, and so on, until none of its blocks decays by more than SPAN.
            while (bits > 0) & decays_by_more(since, SPAN):
                bits -= 1
                half = (i >> bits) & 1
                between = sums_of((apart >> bits) == (half - 1)[:, None], decays, OPERAND, PRECISION)
                left = tl.exp2(between)
                of_keys, of_queries = products_of(keys, queries, left, left, apart >> bits == 1, OPERAND, PRECISION)
                known += of_keys
                weight += of_queries
                since = tl.where((half == 1)[:, None], between, since)
            since = tl.where(bits > 0, since, 0.0)  # else a block is a token, which reads itself
            # Names of their own: triton-xpu 3.3.0b1 ends in a crash where the loop above has them, too.
            opened, undone = tl.exp2(since), tl.exp2(-since)
            own_keys, own_queries = products_of(keys, queries, opened, undone, apart >> bits == 0, OPERAND, PRECISION)
            known += own_keys
            weight += own_queries
            remaining >>= 1
            first += BLOCK
        place = system + number.to(tl.int64) * (CHUNK * CHUNK)
        tl.store(place + i[:, None] * CHUNK + i[None, :], known, (apart > 0) & (blocks > 0))
        tl.store(place + i[None, :] * CHUNK + i[:, None], weight, (apart >= 0) & (blocks > 0))


@kernel(static="steep keyed system weights")
def _pairs(
    steep,
    keyed,
    system,  # out: (chunks, v_heads, CHUNK, CHUNK), decayed products of keys; only below the diagonal
    weights,  # out: likewise, how strength queries read of what each token writes; zero above the diagonal
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)  # of a chunk and a head
    blocks = tl.load(steep + number)
    if blocks < 0:
        return
    i = tl.arange(0, CHUNK)
    keyed += number * (4 * CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + tl.arange(0, BLOCK)[None, :]
    known = tl.zeros([CHUNK, CHUNK], tl.float32)
    weight = tl.zeros([CHUNK, CHUNK], tl.float32)
    for _ in range(0, BLOCK_K, BLOCK):
        turned = tl.trans(tl.load(keyed + 3 * CHUNK * BLOCK_K))
        known = tl.dot(tl.load(keyed), turned, known, input_precision=PRECISION)
        weight = tl.dot(tl.load(keyed + CHUNK * BLOCK_K), turned, weight, input_precision=PRECISION)
        keyed += BLOCK
    square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    is_earlier = i[:, None] >= i[None, :]
    if blocks > 0:
        steep_pairs = tl.load(system + square)
        known += steep_pairs
        weight += tl.trans(steep_pairs)
    tl.store(system + square, known, i[:, None] > i[None, :])
    tl.store(weights + square, tl.where(is_earlier, weight, 0.0))
