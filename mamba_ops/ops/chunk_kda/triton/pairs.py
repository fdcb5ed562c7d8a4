"""What tokens of a chunk keep of each other in Kimi Delta Attention, all chunks at once.

Every channel of a key decays by itself, so what two tokens keep of each other is a sum over channels. A matrix product
finds it for all pairs if their decay is split into a factor of the later token and one of the earlier: at the chunk's
beginning, where what the chunk decays by is moderate. `_decay` has these factors in keys and queries, and `_solve`
multiplies. `_steep_pairs` is for blocks of channels that decay by more: it halves the chunk until they do not. From a
token of the first half to one of the second the decay is split between the halves, and neither factor is above 1.
Exponents are sums of the logs of tokens' decays, not differences of sums over a chunk, so decays of any strength are
exact. Sums over pieces that differ by token are matrix products, too, with a matrix of ones and zeros.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, load_slot, tile_ptrs
from mamba_ops.ops._triton.delta_rule import row_of_both

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_NOTHING_LEFT: tl.constexpr = tl.constexpr(-16384.0)  # the log of a decay to zero: sums of it stay finite


@triton.jit
def to_logs(decays):
    # The binary logs of decays, given natural ones.
    decays *= _LOG2_E
    return tl.where(decays < _NOTHING_LEFT, _NOTHING_LEFT, decays)  # NaN stays


@triton.jit
def load_decays(g, t, first, end, stride, key, in_key, ALIGNED: tl.constexpr):
    # The binary logs of decays of tokens t, zero where they are not from `first` up to `end`.
    there = ((t >= first) & (t < end))[:, None] & in_key[None, :]
    return to_logs(tl.load(tile_ptrs(g, t, stride, key, ALIGNED), there, other=0.0).to(tl.float32))


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


@triton.jit
def _by_fours(pointer, i, i_stride, j, ALIGNED: tl.constexpr):
    # As `tile_ptrs`, but a thread has four channels of all tokens, whatever their dtype: so it sums over tokens itself.
    pointers = pointer + i.to(tl.int64)[:, None] * i_stride + j[None, :]
    if ALIGNED:
        pointers = tl.max_contiguous(tl.multiple_of(pointers, (1, 16)), (1, 4))
    return pointers


@triton.jit
def _load_fours(x, t, first, end, stride, key, in_key, ALIGNED: tl.constexpr):
    there = ((t >= first) & (t < end))[:, None] & in_key[None, :]
    return tl.load(_by_fours(x, t, stride, key, ALIGNED), there, other=0.0).to(tl.float32)


@triton.jit
def _of_length_1(x, L2NORM: tl.constexpr):
    factor = tl.full([x.shape[0]], 1.0, tl.float32)
    if L2NORM:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) + 1e-6)
    return factor


@kernel(first_number="scale", static="factors steep keyed whole")
def _decay(
    q,
    k,
    g,
    cu_seqlens,
    slots,
    factors,  # out: (chunks, v_heads, 2, CHUNK), that give keys and queries their lengths
    steep,  # out: (chunks, v_heads), a bit for every block of channels that decays by more than SPAN; -1: no chunk
    keyed,  # out: (chunks, v_heads, 4, CHUNK, BLOCK_K), keys and queries decayed from the beginning, eight rows of
    # either in turn, keys to the end, and keys divided by their decay from the beginning, zero where that is steep
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
    BLOCK: tl.constexpr,  # channels that are steep together
    TOKENS: tl.constexpr,  # at a time
    SPAN: tl.constexpr,  # binary logs
):
    # A program walks over the tokens twice, with all channels: back from the last one, then on from the first.
    BLOCKS: tl.constexpr = BLOCK_K // BLOCK
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
    factors += number * (2 * CHUNK)
    keyed += number * (4 * CHUNK * BLOCK_K)
    key = tl.arange(0, BLOCK_K)
    in_key = key < K_DIM
    end = tl.minimum(high, low + CHUNK)

    left_before = tl.zeros([BLOCK_K], tl.float32)
    most_left = tl.zeros([BLOCK_K], tl.float32)
    for step in range(CHUNK // TOKENS):
        i = CHUNK - 1 - step * TOKENS - tl.arange(0, TOKENS)
        t = low + i
        keys = _load_fours(k, t, low, high, k_stride, key, in_key, ALIGNED)
        keys *= _of_length_1(keys, L2NORM)[:, None]
        later = to_logs(_load_fours(g, t + 1, low, end, g_stride, key, in_key, ALIGNED))
        left = tl.cumsum(later, axis=0) + left_before[None, :]
        left_before += tl.sum(later, axis=0)
        most_left = tl.maximum(most_left, tl.max(left, axis=0))
        tl.store(_by_fours(keyed + 2 * CHUNK * BLOCK_K, i, BLOCK_K, key, ALIGNED), keys * tl.exp2(left))

    # Since the beginning a channel decays by more than SPAN somewhere, if what is left there differs by that.
    opener = tl.load(g + low.to(tl.int64) * g_stride + key, in_key & (low < high), other=0.0)
    least = left_before + to_logs(opener.to(tl.float32)) - most_left
    is_steep = tl.max(tl.reshape((least < -SPAN).to(tl.int32), [BLOCKS, BLOCK]), axis=1)
    tl.store(steep + number, tl.sum(is_steep << tl.arange(0, BLOCKS), axis=0))
    is_steep = tl.reshape(tl.broadcast_to(is_steep[:, None], [BLOCKS, BLOCK]), [BLOCK_K]) > 0

    before = tl.zeros([BLOCK_K], tl.float32)
    for step in range(CHUNK // TOKENS):
        i = step * TOKENS + tl.arange(0, TOKENS)
        t = low + i
        keys = _load_fours(k, t, low, high, k_stride, key, in_key, ALIGNED)
        queries = _load_fours(q, t, low, high, q_stride, key, in_key, ALIGNED)
        own = to_logs(_load_fours(g, t, low, high, g_stride, key, in_key, ALIGNED))
        of_key = _of_length_1(keys, L2NORM)
        of_query = _of_length_1(queries, L2NORM) * scale
        tl.store(factors + i, of_key)
        tl.store(factors + CHUNK + i, of_query)
        keys *= of_key[:, None]
        queries *= of_query[:, None]
        since = tl.cumsum(own, axis=0) + before[None, :]
        before += tl.sum(own, axis=0)
        opened = tl.exp2(since)
        row_of_key = row_of_both(i)
        tl.store(_by_fours(keyed, row_of_key, BLOCK_K, key, ALIGNED), keys * opened)
        tl.store(_by_fours(keyed, row_of_key + 8, BLOCK_K, key, ALIGNED), queries * opened)
        undone = tl.where(is_steep[None, :], float("-inf"), -since)
        tl.store(_by_fours(keyed + 3 * CHUNK * BLOCK_K, i, BLOCK_K, key, ALIGNED), keys * tl.exp2(undone))
    tl.store(whole + number * BLOCK_K + key, tl.exp2(before))


@kernel(first_number="q_stride", static="factors steep system")
def _steep_pairs(
    q,
    k,
    g,
    cu_seqlens,
    factors,
    steep,
    system,  # out: (chunks, v_heads, CHUNK, CHUNK), of steep blocks of channels alone: decayed products of keys, and
    # turned round, on the diagonal and above it, those of queries and keys
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
