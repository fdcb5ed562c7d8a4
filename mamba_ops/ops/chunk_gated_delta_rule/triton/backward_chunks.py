"""The kernels of the gated delta rule's backward pass that have all chunks at once, but for that of q and k."""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, tile_ptrs
from mamba_ops.ops._triton.decay import exact_sums, split, to_log2
from mamba_ops.ops._triton.delta_rule import factor_of_squares, inverse_of, length_factor, load_numbers

FACTORS: tl.constexpr = tl.constexpr(8)
"""Numbers of a token in a chunk and a head, which `_systems` leaves."""


@triton.jit
def _between(near, up, down, i):
    # The decay from one token to another, zero to an earlier one.
    decay = tl.exp2(tl.where(i[:, None] >= i[None, :], near[:, None] - near[None, :], float("-inf")))
    return decay * up[:, None] * down[None, :]


@triton.jit
def _sums_from(pairs, operand: tl.constexpr, PRECISION: tl.constexpr):
    # The sums of every column from each row on, as of `sums_from`.
    if operand == tl.float16:
        return tl.cumsum(pairs, 0, reverse=True)
    else:
        i = tl.arange(0, pairs.shape[0])
        from_on = (i[:, None] <= i[None, :]).to(operand)
        return tl.dot(from_on, pairs.to(operand), input_precision=PRECISION)


@kernel(first_number="scale", static="queries keys factors inverses weights")
def _systems(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    queries,  # out: (chunks, k_heads, CHUNK, BLOCK_K), normalised and scaled; zero where there is no token
    keys,  # out: likewise
    factors,  # out: (chunks, v_heads, FACTORS, CHUNK), decays up to a token, from it on, of all; of `_between`;
    # strengths, and what keys read of the state counts in what is written, by its strength
    inverses,  # out: (chunks, v_heads, CHUNK, CHUNK), of the chunk's system
    weights,  # out: likewise, how strength queries read of what each token writes
    scale,
    q_stride,  # this and the next three: from token to token
    k_stride,
    g_stride,
    beta_stride,
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
    PRECISION: tl.constexpr,
    SQUARES: tl.constexpr,  # whether lengths of rows are found by matrix products, which read shared memory
):
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    k_head = head // (V_HEADS // K_HEADS)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    t = low + i
    there = (t < high)[:, None] & (key < K_DIM)[None, :]
    operand = weights.dtype.element_ty
    k = tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED)
    q = tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED)
    unit_k = tl.load(k, there, other=0.0)
    unit_q = tl.load(q, there, other=0.0)
    of_tile = (chunk.to(tl.int64) * K_HEADS + k_head) * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
    if SQUARES:
        unit_k = unit_k.to(operand)
        unit_q = unit_q.to(operand)
        turned = tl.trans(unit_k)
        system = tl.dot(unit_k, turned, input_precision=PRECISION)
        of_key = factor_of_squares(system, L2NORM)
        of_query = factor_of_squares(tl.dot(unit_q, tl.trans(unit_q), input_precision=PRECISION), L2NORM) * scale
        if head % (V_HEADS // K_HEADS) == 0:
            tl.store(keys + of_tile, tl.load(k, there, other=0.0).to(tl.float32) * of_key[:, None])
            tl.store(queries + of_tile, tl.load(q, there, other=0.0).to(tl.float32) * of_query[:, None])
    else:
        unit_k = unit_k.to(tl.float32)
        unit_q = unit_q.to(tl.float32)
        unit_k = (unit_k * length_factor(unit_k, L2NORM)[:, None]).to(operand)
        unit_q = (unit_q * (length_factor(unit_q, L2NORM) * scale)[:, None]).to(operand)
        if head % (V_HEADS // K_HEADS) == 0:
            tl.store(keys + of_tile, unit_k)
            tl.store(queries + of_tile, unit_q)
        turned = tl.trans(unit_k)

    strength = load_numbers(beta, head, t, beta_stride, high)
    total, left = exact_sums(load_numbers(g, head, t, g_stride, high) * 1.4426950408889634)
    near, up, down = split(total)
    number = chunk.to(tl.int64) * V_HEADS + head
    factors += number * (FACTORS * CHUNK) + i
    since = tl.exp2(to_log2(total))
    tl.store(factors, since)
    tl.store(factors + CHUNK, tl.exp2(to_log2(left)))
    tl.store(factors + 2 * CHUNK, tl.exp2(to_log2(total + left)))
    tl.store(factors + 3 * CHUNK, near)
    tl.store(factors + 4 * CHUNK, up)
    tl.store(factors + 5 * CHUNK, down)
    tl.store(factors + 6 * CHUNK, strength)
    tl.store(factors + 7 * CHUNK, -since * strength)

    place = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    weight = tl.dot(unit_q, turned, input_precision=PRECISION)
    if SQUARES:
        between = _between(near, up, of_key * down, i)
        tl.store(weights + place, weight * between * of_query[:, None])
        between *= of_key[:, None]
    else:
        between = _between(near, up, down, i)
        tl.store(weights + place, weight * between)
        system = tl.dot(unit_k, turned, input_precision=PRECISION)
    tl.store(inverses + place, inverse_of(system * between * strength[:, None], CHUNK, PRECISION))


@kernel(first_number="grad_stride", static="queries keys factors written found weights inverses numbers")
def _products(
    grad_output,
    cu_seqlens,
    queries,
    keys,
    factors,
    written,
    found,
    weights,  # out: gradients of the products of queries and keys
    inverses,  # out: of the products of keys, and their transpose added
    numbers,  # out: (chunks, v_heads, 6, CHUNK): the first two, described where they are stored
    grad_stride,
    length,
    rows,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Rows of matrices of pairs are the tokens that read, or find something missing.
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    t = low + i
    operand = written.dtype.element_ty
    number = chunk.to(tl.int64) * V_HEADS + head
    of_tile = (chunk.to(tl.int64) * K_HEADS + head // (V_HEADS // K_HEADS)) * (CHUNK * BLOCK_K)
    of_tile += i[:, None] * BLOCK_K + key[None, :]
    q = tl.load(queries + of_tile)  # all that is read early, so that it is there in time
    k = tl.load(keys + of_tile)
    factors += number * (FACTORS * CHUNK) + i
    near = tl.load(factors + 3 * CHUNK)
    up = tl.load(factors + 4 * CHUNK)
    down = tl.load(factors + 5 * CHUNK)
    strength = tl.load(factors + 6 * CHUNK)[:, None]
    grad_weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    grad_system = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in range(0, V_PADDED, BLOCK):
        value = start + tl.arange(0, BLOCK)
        there = (t < high)[:, None] & (value < V_DIM)[None, :]
        grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
        of_values = number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
        new = tl.trans(tl.load(written + of_values))
        grad_weights = tl.dot(grad.to(operand), new, grad_weights, input_precision=PRECISION)
        grad_system = tl.dot(tl.load(found + of_values), new, grad_system, input_precision=PRECISION)

    between = _between(near, up, down, i)
    turned = tl.trans(k)
    square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    grad_weights *= between
    tl.store(weights + square, grad_weights)
    pairs = grad_weights * tl.dot(q, turned, input_precision=PRECISION)
    is_later = i[:, None] > i[None, :]
    grad_system = tl.where(is_later, -grad_system * between, 0.0)
    by_strength = grad_system * tl.dot(k, turned, input_precision=PRECISION)
    pairs += by_strength * strength
    grad_system *= strength
    tl.store(inverses + square, grad_system + tl.trans(grad_system))

    # Of every token: what tokens from it on read of those before it; and its strength's share of the system.
    numbers += number * (6 * CHUNK) + i
    later = _sums_from(pairs, operand, PRECISION)
    tl.store(numbers, tl.sum(tl.where(is_later, later, 0.0), axis=1))
    tl.store(numbers + CHUNK, tl.sum(by_strength, axis=1))


@kernel(first_number="g_stride", static="factors numbers met")
def _of_gates(
    cu_seqlens,
    factors,
    numbers,
    met,
    grad_g,
    grad_beta,
    g_stride,  # this and the next: from token to token
    beta_stride,
    length,
    rows,
    V_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    chunk = tl.program_id(0)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_head = (head < V_HEADS)[None, :]
    i = tl.arange(0, CHUNK)
    t = (low + i)[:, None]
    number = (chunk.to(tl.int64) * V_HEADS + head)[None, :]
    numbers += number * (6 * CHUNK) + i[:, None]
    leaves = tl.load(numbers + 5 * CHUNK - 1, in_head & (i > 0)[:, None], other=0.0)  # of the token before
    reads = tl.load(numbers + 2 * CHUNK, in_head, other=0.0) - tl.load(numbers + 4 * CHUNK, in_head, other=0.0)
    whole = tl.load(factors + number * (FACTORS * CHUNK) + 2 * CHUNK, in_head, other=0.0)
    grad_decay = tl.load(numbers, in_head, other=0.0) + whole * tl.load(met + number, in_head, other=0.0)
    grad_decay += tl.cumsum(leaves, 0) + tl.cumsum(reads, 0, reverse=True)
    there = (t < high) & in_head
    tl.store(grad_g + t.to(tl.int64) * g_stride + head[None, :], grad_decay, there)
    strength = tl.load(numbers + CHUNK, in_head, other=0.0) + tl.load(numbers + 3 * CHUNK, in_head, other=0.0)
    tl.store(grad_beta + t.to(tl.int64) * beta_stride + head[None, :], strength, there)
