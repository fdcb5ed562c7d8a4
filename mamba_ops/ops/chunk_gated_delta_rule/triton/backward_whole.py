"""The gradients of q and k of the gated delta rule, and how much tokens count, in one launch for all chunks at once.

What `_products` and `_gradients` do in two: the gradients of products of tokens stay in registers, and what both need
is read once. Best where a program has many registers and much shared memory.
"""

import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, tile_ptrs
from mamba_ops.ops._triton.decay import sums_from
from mamba_ops.ops._triton.delta_rule import through_norm
from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_chunks import FACTORS, _between


@kernel(first_number="scale", static="queries keys factors states adjoints written found numbers met")
def _whole_gradients(
    q,
    k,
    v,
    grad_output,
    cu_seqlens,
    queries,
    keys,
    factors,
    states,
    adjoints,
    written,
    found,
    numbers,  # out: (chunks, v_heads, 6, CHUNK), described where they are stored
    met,  # out: (chunks, v_heads), what the state before a chunk counts at its end
    grad_q,
    grad_k,
    scale,
    q_stride,
    k_stride,
    v_stride,
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
    # Two programs have the same head of k: for queries and for keys. Both find the gradients of the products of keys
    # and queries, each with the tokens as rows whose gradients it makes. What rows of two matrices have in common is
    # the diagonal of a product: matrix units find it without holding both in registers.
    PER_KEY: tl.constexpr = V_HEADS // K_HEADS
    chunk = tl.program_id(0) // (2 * K_HEADS)
    k_head = tl.program_id(0) // 2 % K_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    t = low + i
    there = (t < high)[:, None] & (key < K_DIM)[None, :]
    operand = states.dtype.element_ty
    of_tile = (chunk.to(tl.int64) * K_HEADS + k_head) * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
    queries += of_tile
    keys += of_tile
    total = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    if tl.program_id(0) % 2 == 0:
        for head in range(k_head * PER_KEY, (k_head + 1) * PER_KEY):
            number = chunk.to(tl.int64) * V_HEADS + head
            opened = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            weight = tl.zeros([CHUNK, CHUNK], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                of_value = (t < high)[:, None] & (value < V_DIM)[None, :]
                grad = tl.load(
                    tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), of_value, other=0.0
                ).to(operand)
                new = tl.load(written + number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :])
                before = tl.load(states + number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :])
                opened = tl.dot(grad, before, opened, input_precision=PRECISION)
                weight = tl.dot(grad, tl.trans(new), weight, input_precision=PRECISION)
            of_tokens = factors + number * (FACTORS * CHUNK) + i
            opened *= tl.load(of_tokens)[:, None]
            # Of every token: how much of the state before the chunk it reads.
            read = tl.sum(opened * tl.load(queries).to(tl.float32), axis=1)
            tl.store(numbers + number * (6 * CHUNK) + 2 * CHUNK + i, read)
            total += opened
            near = tl.load(of_tokens + 3 * CHUNK)
            weight *= _between(near, tl.load(of_tokens + 4 * CHUNK), tl.load(of_tokens + 5 * CHUNK), i)
            total = tl.dot(weight.to(operand), tl.load(keys), total, input_precision=PRECISION)
        total *= scale
        if L2NORM:
            x = tl.load(tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there, other=0.0)
            total = through_norm(x, total)
        tl.store(tile_ptrs(grad_q + k_head * K_DIM, t, grad_q_stride, key, ALIGNED), total, there)
    else:
        is_later = i[None, :] > i[:, None]
        for head in range(k_head * PER_KEY, (k_head + 1) * PER_KEY):
            number = chunk.to(tl.int64) * V_HEADS + head
            out = numbers + number * (6 * CHUNK) + i
            of_tokens = factors + number * (FACTORS * CHUNK) + i
            of_values = number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED
            strength = tl.load(of_tokens + 6 * CHUNK)

            # Of pairs of tokens, whose rows have the one that is read.
            weight = tl.zeros([CHUNK, CHUNK], tl.float32)
            system = tl.zeros([CHUNK, CHUNK], tl.float32)
            given = tl.zeros([CHUNK], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                of_value = (t < high)[:, None] & (value < V_DIM)[None, :]
                grad = tl.load(
                    tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), of_value, other=0.0
                )
                values = tl.load(tile_ptrs(v + head * V_DIM, t, v_stride, value, ALIGNED), of_value, other=0.0)
                new = tl.load(written + of_values + value[None, :])
                solved = tl.load(found + of_values + value[None, :])
                given += tl.sum(solved.to(tl.float32) * values.to(tl.float32), axis=1)
                weight = tl.dot(new, tl.trans(grad.to(operand)), weight, input_precision=PRECISION)
                system = tl.dot(new, tl.trans(solved), system, input_precision=PRECISION)
            near = tl.load(of_tokens + 3 * CHUNK)
            between = tl.exp2(tl.where(i[None, :] >= i[:, None], near[None, :] - near[:, None], float("-inf")))
            between *= tl.load(of_tokens + 4 * CHUNK)[None, :] * tl.load(of_tokens + 5 * CHUNK)[:, None]
            unit_k = tl.load(keys)
            unit_q = tl.load(queries)
            system = tl.where(is_later, -system * between, 0.0)
            by_strength = system * tl.dot(unit_k, tl.trans(unit_k), input_precision=PRECISION)
            tl.store(out + CHUNK, tl.sum(by_strength, axis=0))
            pairs = by_strength * strength[None, :]
            system = (system * strength[None, :]).to(operand)
            weight *= between
            pairs += weight * tl.dot(unit_k, tl.trans(unit_q), input_precision=PRECISION)
            # Of every token: what tokens from it on read of those before it.
            later = sums_from(pairs, operand, PRECISION)
            tl.store(out, tl.sum(tl.where(is_later, later, 0.0), axis=0))
            total = tl.dot(weight.to(operand), unit_q, total, input_precision=PRECISION)
            total = tl.dot(system, unit_k, total, input_precision=PRECISION)
            total = tl.dot(tl.trans(system), unit_k, total, input_precision=PRECISION)

            known = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                solved = tl.load(found + of_values + value[None, :])
                before = tl.load(states + number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :])
                known = tl.dot(solved, before, known, input_precision=PRECISION)
            known *= tl.load(of_tokens)[:, None]
            # Of every token: how much its strength counts, and by way of what is known already; what the state after
            # the chunk keeps of it.
            knows = tl.sum(known * tl.load(keys).to(tl.float32), axis=1)
            tl.store(out + 3 * CHUNK, given - knows)
            tl.store(out + 4 * CHUNK, knows * strength)
            total -= known * strength[:, None]
            leaving = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            meets = tl.zeros([BLOCK, BLOCK], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                new = tl.load(written + of_values + value[None, :])
                of_state = number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
                after = tl.load(adjoints + of_state)
                leaving = tl.dot(new, after, leaving, input_precision=PRECISION)
                meets = tl.dot(tl.load(states + of_state), tl.trans(after), meets, input_precision=PRECISION)
            leaving *= tl.load(of_tokens + CHUNK)[:, None]
            tl.store(out + 5 * CHUNK, tl.sum(leaving * tl.load(keys).to(tl.float32), axis=1))
            value = tl.arange(0, BLOCK)
            tl.store(met + number, tl.sum(tl.where(value[:, None] == value[None, :], meets, 0.0)))
            total += leaving
        if L2NORM:
            x = tl.load(tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED), there, other=0.0)
            total = through_norm(x, total)
        tl.store(tile_ptrs(grad_k + k_head * K_DIM, t, grad_k_stride, key, ALIGNED), total, there)
