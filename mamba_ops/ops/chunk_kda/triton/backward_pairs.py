"""The kernels of chunk_kda's backward pass that find what goes by way of products of tokens, and sum over heads."""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, tile_ptrs
from mamba_ops.ops._triton.delta_rule import _PART, through_norm
from mamba_ops.ops.chunk_kda.triton.pairs import _LOG2_E, load_decays


@triton.jit
def until_part(g, first, low, high, between, stride, key, in_key, ALIGNED: tl.constexpr):
    # Of a part's tokens, from `first` on: the decay from each until the part begins before which the logs of whole
    # parts are `between`; and those with this part's own.
    t = first + tl.arange(0, _PART)
    later = load_decays(g, t + 1, low, tl.minimum(first + _PART, high), stride, key, in_key, ALIGNED)
    opener = tl.load(g + first.to(tl.int64) * stride + key, in_key & (first < high), other=0.0).to(tl.float32) * _LOG2_E
    decay = tl.exp2(tl.cumsum(later, 0, reverse=True) + between[None, :])
    return decay, between + (tl.sum(later, 0) + opener)


@triton.jit
def load_part(x, factors, first, high, stride, key, in_key, ALIGNED: tl.constexpr):
    # A part's keys or queries as they are multiplied, zero where there is no token.
    i = tl.arange(0, _PART)
    there = (first + i < high)[:, None] & in_key[None, :]
    factor = tl.load(factors + i, first + i < high, other=0.0)
    return tl.load(tile_ptrs(x, first + i, stride, key, ALIGNED), there, other=0.0).to(tl.float32) * factor[:, None]


@kernel(first_number="q_stride", static="factors inverses weights grad_queries grad_keys decays")
def _pair_gradients(
    q,
    k,
    g,
    cu_seqlens,
    factors,
    inverses,  # gradients of the decayed products of keys
    weights,  # of those of queries and keys
    grad_queries,  # in, and out: that, and by way of products
    grad_keys,  # likewise
    decays,
    grad_g,
    q_stride,
    k_stride,
    g_stride,
    grad_g_stride,
    length,
    rows,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    # A program is one warp and has some channels of a part: all sums over its tokens are in one thread.
    PARTS: tl.constexpr = CHUNK // _PART
    BLOCKS: tl.constexpr = BLOCK_K // BLOCK
    key = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(0) // BLOCKS % PARTS
    head = tl.program_id(0) // BLOCKS // PARTS % V_HEADS
    chunk = tl.program_id(0) // BLOCKS // PARTS // V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    begin = low + part * _PART
    if begin >= high:
        return
    operand = weights.dtype.element_ty
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    g += head * K_DIM
    number = chunk.to(tl.int64) * V_HEADS + head
    in_key = key < K_DIM
    i = tl.arange(0, _PART)
    t = begin + i
    of_keys = factors + number * (2 * CHUNK)
    of_queries = of_keys + CHUNK
    keys = load_part(k, of_keys + part * _PART, begin, high, k_stride, key, in_key, ALIGNED)
    queries = load_part(q, of_queries + part * _PART, begin, high, q_stride, key, in_key, ALIGNED)
    opening = tl.exp2(tl.cumsum(load_decays(g, t, low, high, g_stride, key, in_key, ALIGNED), 0))
    square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]

    # What the part's tokens read of those in parts before it.
    by_query = tl.zeros([_PART, BLOCK], tl.float32)
    by_key = tl.zeros([_PART, BLOCK], tl.float32)
    between = tl.zeros([BLOCK], tl.float32)
    for back in range(part):
        other = part - 1 - back
        first = low + other * _PART
        decay, between = until_part(g, first, low, high, between, g_stride, key, in_key, ALIGNED)
        given = load_part(k, of_keys + other * _PART, first, high, k_stride, key, in_key, ALIGNED) * decay
        place = square + part * (_PART * CHUNK) + other * _PART
        by_query = tl.dot(tl.load(weights + place), given.to(operand), by_query, input_precision=PRECISION)
        by_key = tl.dot(tl.load(inverses + place), given.to(operand), by_key, input_precision=PRECISION)
    by_query *= opening
    by_key *= opening
    of_decays = tl.cumsum(by_query * queries + by_key * keys, 0, reverse=True)

    # What those in parts after it read of its tokens; and of those before it, which have all its decays between.
    given = tl.zeros([_PART, BLOCK], tl.float32)
    spanned = tl.zeros([BLOCK], tl.float32)
    between = tl.zeros([BLOCK], tl.float32)
    for later in range(part + 1, PARTS):
        first = low + later * _PART
        decays_there = load_decays(g, first + i, low, high, g_stride, key, in_key, ALIGNED)
        within = tl.exp2(tl.cumsum(decays_there, 0))
        reading_k = load_part(k, of_keys + later * _PART, first, high, k_stride, key, in_key, ALIGNED) * within
        reading_q = load_part(q, of_queries + later * _PART, first, high, q_stride, key, in_key, ALIGNED) * within
        place = square + later * (_PART * CHUNK)
        weight = tl.trans(tl.load(weights + place + part * _PART))
        known = tl.trans(tl.load(inverses + place + part * _PART))
        total = tl.dot(weight, reading_q.to(operand), input_precision=PRECISION)
        total = tl.dot(known, reading_k.to(operand), total, input_precision=PRECISION)
        decay, since = until_part(g, begin, low, high, between, g_stride, key, in_key, ALIGNED)
        given += total * decay
        for back in range(part):
            other = part - 1 - back
            at = low + other * _PART
            decay, since = until_part(g, at, low, high, since, g_stride, key, in_key, ALIGNED)
            kept = load_part(k, of_keys + other * _PART, at, high, k_stride, key, in_key, ALIGNED) * decay
            weight = tl.load(weights + place + other * _PART)
            known = tl.load(inverses + place + other * _PART)
            spanned += tl.sum(tl.dot(weight, kept.to(operand), input_precision=PRECISION) * reading_q, axis=0)
            spanned += tl.sum(tl.dot(known, kept.to(operand), input_precision=PRECISION) * reading_k, axis=0)
        between += tl.sum(decays_there, 0)
    before_it = (i[:, None] > i[None, :]).to(tl.float32)
    of_decays += tl.dot(before_it, given * keys, input_precision=SUMS) + spanned[None, :]

    # Pairs of its own tokens, one column after the other.
    exponents = tl.zeros([_PART, BLOCK], tl.float32)
    own = number * (CHUNK * CHUNK) + (part * _PART + i) * CHUNK + part * _PART
    for back in range(_PART):
        j = _PART - 1 - back
        token = (begin + j).to(tl.int64)
        after = in_key & (j < _PART - 1) & (token + 1 < high)
        after = tl.load(g + (token + 1) * g_stride + key, after, other=0.0).to(tl.float32) * _LOG2_E
        exponents = tl.where(i[:, None] > j, exponents + after[None, :], 0.0)
        decay = tl.exp2(tl.where(i[:, None] >= j, exponents, float("-inf")))
        factor = tl.load(of_keys + part * _PART + j, token < high, other=0.0)
        its_key = tl.load(k + token * k_stride + key, in_key & (token < high), other=0.0).to(tl.float32) * factor
        weight = tl.load(weights + own + j).to(tl.float32)[:, None] * decay
        known = tl.load(inverses + own + j).to(tl.float32)[:, None] * decay
        by_query += weight * its_key[None, :]
        by_key += known * its_key[None, :]
        pairs = weight * queries + known * keys
        given += tl.where(i[:, None] == j, tl.sum(pairs, axis=0)[None, :], 0.0)
        pairs = tl.cumsum(pairs * its_key[None, :], 0, reverse=True)
        of_decays += tl.where(i[:, None] > j, pairs, 0.0)

    there = (t < high)[:, None] & in_key[None, :]
    place = number * (CHUNK * BLOCK_K) + (part * _PART + i)[:, None] * BLOCK_K + key[None, :]
    tl.store(grad_queries + place, tl.load(grad_queries + place) + by_query)
    tl.store(grad_keys + place, tl.load(grad_keys + place) + (by_key + given))
    of_decays += tl.load(decays + place)
    tl.store(tile_ptrs(grad_g + head * K_DIM, t, grad_g_stride, key, ALIGNED), of_decays, there)


@kernel(first_number="scale", static="grad_queries grad_keys")
def _gather(
    q,
    k,
    cu_seqlens,
    grad_queries,
    grad_keys,
    grad_q,
    grad_k,
    scale,
    q_stride,
    k_stride,
    grad_q_stride,
    grad_k_stride,
    length,
    rows,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    L2NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The heads of v that share one of q and k, together.
    PER_KEY: tl.constexpr = V_HEADS // K_HEADS
    PARTS: tl.constexpr = CHUNK // _PART
    part = tl.program_id(0) % PARTS
    k_head = tl.program_id(0) // PARTS % K_HEADS
    chunk = tl.program_id(0) // PARTS // K_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    key = tl.arange(0, BLOCK_K)
    i = part * _PART + tl.arange(0, _PART)
    t = low + i
    there = (t < high)[:, None] & (key < K_DIM)[None, :]
    total_q = tl.zeros([_PART, BLOCK_K], tl.float32)
    total_k = tl.zeros([_PART, BLOCK_K], tl.float32)
    for head in range(k_head * PER_KEY, (k_head + 1) * PER_KEY):
        place = (chunk.to(tl.int64) * V_HEADS + head) * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
        total_q += tl.load(grad_queries + place, there, other=0.0)
        total_k += tl.load(grad_keys + place, there, other=0.0)
    total_q *= scale
    if L2NORM:
        x = tl.load(tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there, other=0.0)
        total_q = through_norm(x, total_q)
        x = tl.load(tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED), there, other=0.0)
        total_k = through_norm(x, total_k)
    tl.store(tile_ptrs(grad_q + k_head * K_DIM, t, grad_q_stride, key, ALIGNED), total_q, there)
    tl.store(tile_ptrs(grad_k + k_head * K_DIM, t, grad_k_stride, key, ALIGNED), total_k, there)
