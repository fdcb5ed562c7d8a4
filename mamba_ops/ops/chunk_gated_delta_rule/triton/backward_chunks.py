"""The kernels of the gated delta rule's backward pass that have all chunks at once."""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, tile_ptrs
from mamba_ops.ops._triton.decay import exact_sums, split, to_log2
from mamba_ops.ops.chunk_gated_delta_rule.triton.kernels import _factor, _inverse


@triton.jit
def _between(near, up, down, i):
    # The decay from one token to another, zero to an earlier one.
    decay = tl.exp2(tl.where(i[:, None] >= i[None, :], near[:, None] - near[None, :], float("-inf")))
    return decay * up[:, None] * down[None, :]


@triton.jit
def load_numbers(numbers, head, t, stride, high):
    # A number for each token, zero where there is none.
    return tl.load(numbers + head + t.to(tl.int64) * stride, t < high, other=0.0).to(tl.float32)


@triton.jit
def _through_norm(x, grad):
    # The gradient of rows x, given that of the rows with length 1.
    x = x.to(tl.float32)
    factor = tl.expand_dims(_factor(x, True), 1)
    x *= factor
    return (grad - x * tl.expand_dims(tl.sum(x * grad, axis=1), 1)) * factor


@kernel(first_number="scale", static="queries keys factors inverses weights")
def _systems(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    queries,  # out: (chunks, k_heads, CHUNK, BLOCK_K), normalised and scaled; zero where there is no token
    keys,  # out: likewise
    factors,  # out: (chunks, v_heads, 6, CHUNK), decays up to a token, from it on, of all; of `_between`
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
    unit_k = tl.load(tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
    unit_q = tl.load(tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there, other=0.0).to(tl.float32)
    unit_k = (unit_k * _factor(unit_k, L2NORM)[:, None]).to(operand)
    unit_q = (unit_q * (_factor(unit_q, L2NORM) * scale)[:, None]).to(operand)
    if head % (V_HEADS // K_HEADS) == 0:
        of_tile = (chunk.to(tl.int64) * K_HEADS + k_head) * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
        tl.store(keys + of_tile, unit_k)
        tl.store(queries + of_tile, unit_q)

    total, left = exact_sums(load_numbers(g, head, t, g_stride, high) * 1.4426950408889634)
    near, up, down = split(total)
    number = chunk.to(tl.int64) * V_HEADS + head
    factors += number * (6 * CHUNK) + i
    tl.store(factors, tl.exp2(to_log2(total)))
    tl.store(factors + CHUNK, tl.exp2(to_log2(left)))
    tl.store(factors + 2 * CHUNK, tl.exp2(to_log2(total + left)))
    tl.store(factors + 3 * CHUNK, near)
    tl.store(factors + 4 * CHUNK, up)
    tl.store(factors + 5 * CHUNK, down)

    between = _between(near, up, down, i)
    turned = tl.trans(unit_k)
    place = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    tl.store(weights + place, tl.dot(unit_q, turned, input_precision=PRECISION) * between)
    system = tl.dot(unit_k, turned, input_precision=PRECISION) * between
    system *= load_numbers(beta, head, t, beta_stride, high)[:, None]
    tl.store(inverses + place, _inverse(tl.where(i[:, None] > i[None, :], system, 0.0), CHUNK, PRECISION))


@kernel(first_number="v_stride", static="queries keys factors states adjoints written found weights inverses")
def _products(
    v,
    beta,
    grad_output,
    cu_seqlens,
    queries,
    keys,
    factors,
    states,
    adjoints,
    written,
    found,
    weights,  # out: gradients of the products of queries and keys
    inverses,  # out: of the products of keys, and their transpose added
    grad_g,
    grad_beta,
    v_stride,
    beta_stride,
    grad_stride,
    grad_g_stride,
    grad_beta_stride,
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
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    t = low + i
    operand = states.dtype.element_ty
    of_tile = chunk.to(tl.int64) * K_HEADS + head // (V_HEADS // K_HEADS)
    of_tile = of_tile * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
    q = tl.load(queries + of_tile)
    k = tl.load(keys + of_tile)
    number = chunk.to(tl.int64) * V_HEADS + head
    factors += number * (6 * CHUNK)
    since = tl.load(factors + i)
    left = tl.load(factors + CHUNK + i)
    strength = load_numbers(beta, head, t, beta_stride, high)
    grad_weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    grad_system = tl.zeros([CHUNK, CHUNK], tl.float32)
    # Gradients of the decays up to a token, of those from it to the chunk's end, and of all.
    reads = tl.zeros([CHUNK], tl.float32)
    leaves = tl.zeros([CHUNK], tl.float32)
    crosses = tl.zeros([BLOCK_K], tl.float32)
    grad_strength = tl.zeros([CHUNK], tl.float32)
    for start in range(0, V_PADDED, BLOCK):
        value = start + tl.arange(0, BLOCK)
        there = (t < high)[:, None] & (value < V_DIM)[None, :]
        grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
        values = tl.load(tile_ptrs(v + head * V_DIM, t, v_stride, value, ALIGNED), there, other=0.0)
        of_values = number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
        new = tl.load(written + of_values)
        solved = tl.load(found + of_values)
        of_state = number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
        before = tl.load(states + of_state)
        after = tl.load(adjoints + of_state)

        grad_weights = tl.dot(grad.to(operand), tl.trans(new), grad_weights, input_precision=PRECISION)
        grad_system = tl.dot(solved, tl.trans(new), grad_system, input_precision=PRECISION)
        crosses += tl.sum(before.to(tl.float32) * after.to(tl.float32), axis=0)
        read = tl.dot(q, tl.trans(before), input_precision=PRECISION) * since[:, None]
        reads += tl.sum(grad.to(tl.float32) * read, axis=1)
        known = tl.dot(k, tl.trans(before), input_precision=PRECISION) * since[:, None]
        solved = solved.to(tl.float32)
        reads -= tl.sum(solved * known, axis=1) * strength
        grad_strength += tl.sum(solved * (values.to(tl.float32) - known), axis=1)
        leaving = tl.dot(k, tl.trans(after), input_precision=PRECISION) * left[:, None]
        leaves += tl.sum(new.to(tl.float32) * leaving, axis=1)

    between = _between(
        tl.load(factors + 3 * CHUNK + i), tl.load(factors + 4 * CHUNK + i), tl.load(factors + 5 * CHUNK + i), i
    )
    is_later = i[:, None] > i[None, :]
    square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    grad_weights *= between
    tl.store(weights + square, grad_weights)
    pairs = grad_weights * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    grad_system = tl.where(is_later, -grad_system * between, 0.0)
    by_strength = grad_system * tl.dot(k, tl.trans(k), input_precision=PRECISION)
    grad_strength += tl.sum(by_strength, axis=1)
    pairs += by_strength * strength[:, None]
    grad_system *= strength[:, None]
    tl.store(inverses + square, grad_system + tl.trans(grad_system))

    later = tl.cumsum(pairs, 0, reverse=True)  # over tokens from each one on; then over those before it
    grad_decay = tl.sum(tl.where(is_later, later, 0.0), axis=1)
    grad_decay += tl.sum(tl.where(is_later, leaves[None, :], 0.0), axis=1)
    grad_decay += tl.cumsum(reads, 0, reverse=True)
    grad_decay += tl.sum(crosses, axis=0) * tl.load(factors + 2 * CHUNK)
    tl.store(grad_g + head + t.to(tl.int64) * grad_g_stride, grad_decay, t < high)
    tl.store(grad_beta + head + t.to(tl.int64) * grad_beta_stride, grad_strength, t < high)


@kernel(first_number="scale", static="queries keys factors states adjoints written found weights inverses")
def _gradients(
    q,
    k,
    beta,
    grad_output,
    cu_seqlens,
    queries,
    keys,
    factors,
    states,
    adjoints,
    written,
    found,
    weights,
    inverses,
    grad_q,
    grad_k,
    scale,
    q_stride,
    k_stride,
    beta_stride,
    grad_stride,
    grad_q_stride,
    grad_k_stride,
    length,
    rows,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    L2NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PER_KEY: tl.constexpr = V_HEADS // K_HEADS
    chunk = tl.program_id(0) // K_HEADS
    k_head = tl.program_id(0) % K_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    t = low + i
    operand = states.dtype.element_ty
    of_tile = (chunk.to(tl.int64) * K_HEADS + k_head) * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
    sum_q = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    sum_k = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for head in range(k_head * PER_KEY, (k_head + 1) * PER_KEY):
        number = chunk.to(tl.int64) * V_HEADS + head
        since = tl.load(factors + number * (6 * CHUNK) + i)
        left = tl.load(factors + number * (6 * CHUNK) + CHUNK + i)
        strength = load_numbers(beta, head, t, beta_stride, high)
        for start in range(0, V_PADDED, BLOCK):
            value = start + tl.arange(0, BLOCK)
            there = (t < high)[:, None] & (value < V_DIM)[None, :]
            grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
            of_values = number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
            new = tl.load(written + of_values).to(tl.float32)
            solved = tl.load(found + of_values).to(tl.float32)
            of_state = number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
            before = tl.load(states + of_state)
            after = tl.load(adjoints + of_state)
            opened = (grad.to(tl.float32) * since[:, None]).to(operand)
            sum_q = tl.dot(opened, before, sum_q, input_precision=PRECISION)
            opened = (solved * (-strength * since)[:, None]).to(operand)
            sum_k = tl.dot(opened, before, sum_k, input_precision=PRECISION)
            sum_k = tl.dot((new * left[:, None]).to(operand), after, sum_k, input_precision=PRECISION)
        square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
        weight = tl.load(weights + square)
        unit_k = tl.load(keys + of_tile)
        sum_q = tl.dot(weight, unit_k, sum_q, input_precision=PRECISION)
        sum_k = tl.dot(tl.load(inverses + square), unit_k, sum_k, input_precision=PRECISION)
        sum_k = tl.dot(tl.trans(weight), tl.load(queries + of_tile), sum_k, input_precision=PRECISION)

    there = (t < high)[:, None] & (key < K_DIM)[None, :]
    sum_q *= scale
    if L2NORM:
        sum_q = _through_norm(
            tl.load(tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there, other=0.0), sum_q
        )
        sum_k = _through_norm(
            tl.load(tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED), there, other=0.0), sum_k
        )
    tl.store(tile_ptrs(grad_q + k_head * K_DIM, t, grad_q_stride, key, ALIGNED), sum_q, there)
    tl.store(tile_ptrs(grad_k + k_head * K_DIM, t, grad_k_stride, key, ALIGNED), sum_k, there)
