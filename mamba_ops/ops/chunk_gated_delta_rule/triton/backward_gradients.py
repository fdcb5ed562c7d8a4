"""The kernel of the gated delta rule's backward pass that makes the gradients of q and k of those of their products."""

import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, tile_ptrs
from mamba_ops.ops._triton.delta_rule import through_norm
from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_chunks import FACTORS


@kernel(first_number="scale", static="queries keys factors states adjoints written found weights inverses numbers met")
def _gradients(
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
    weights,
    inverses,
    numbers,  # out: the last four, described where they are stored
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
    # Two programs have the same head of k: for queries and for keys. What rows of two matrices have in common is the
    # diagonal of a product: matrix units find it without holding both in registers. What is read once is asked for
    # where it is used: earlier, it would take registers.
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
    of_square = i[:, None] * CHUNK + i[None, :]
    total = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    if tl.program_id(0) % 2 == 0:
        for head in range(k_head * PER_KEY, (k_head + 1) * PER_KEY):
            number = chunk.to(tl.int64) * V_HEADS + head
            of_tokens = factors + number * (FACTORS * CHUNK) + i
            opened = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                of_value = (t < high)[:, None] & (value < V_DIM)[None, :]
                grad = tl.load(
                    tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), of_value, other=0.0
                )
                before = tl.load(states + number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :])
                opened = tl.dot(grad.to(operand), before, opened, input_precision=PRECISION)
            since = tl.load(of_tokens)
            unit_q = tl.load(queries)
            opened *= since[:, None]
            # Of every token: how much of the state before the chunk it reads.
            read = tl.sum(opened * unit_q.to(tl.float32), axis=1)
            tl.store(numbers + number * (6 * CHUNK) + 2 * CHUNK + i, read)
            total += opened
            weight = tl.load(weights + number * (CHUNK * CHUNK) + of_square)
            unit_k = tl.load(keys)
            total = tl.dot(weight, unit_k, total, input_precision=PRECISION)
        total *= scale
        if L2NORM:
            x = tl.load(tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there, other=0.0)
            total = through_norm(x, total)
        tl.store(tile_ptrs(grad_q + k_head * K_DIM, t, grad_q_stride, key, ALIGNED), total, there)
    else:
        for head in range(k_head * PER_KEY, (k_head + 1) * PER_KEY):
            number = chunk.to(tl.int64) * V_HEADS + head
            of_tokens = factors + number * (FACTORS * CHUNK) + i
            out = numbers + number * (6 * CHUNK) + i
            known = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            given = tl.zeros([CHUNK, CHUNK], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                of_value = (t < high)[:, None] & (value < V_DIM)[None, :]
                values = tl.load(tile_ptrs(v + head * V_DIM, t, v_stride, value, ALIGNED), of_value, other=0.0)
                solved = tl.load(found + number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :])
                before = tl.load(states + number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :])
                known = tl.dot(solved, before, known, input_precision=PRECISION)
                given = tl.dot(solved, tl.trans(values.to(operand)), given, input_precision=PRECISION)
            since = tl.load(of_tokens)
            strength = tl.load(of_tokens + 6 * CHUNK)
            unit_k = tl.load(keys)
            known *= since[:, None]
            # Of every token: how much its strength counts, and by way of what is known already; what the state after
            # the chunk keeps of it.
            knows = tl.sum(known * unit_k.to(tl.float32), axis=1)
            given = tl.sum(tl.where(i[:, None] == i[None, :], given, 0.0), axis=1)
            tl.store(out + 3 * CHUNK, given - knows)
            tl.store(out + 4 * CHUNK, knows * strength)
            total -= known * strength[:, None]
            leaving = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            meets = tl.zeros([BLOCK, BLOCK], tl.float32)
            for start in range(0, V_PADDED, BLOCK):
                value = start + tl.arange(0, BLOCK)
                new = tl.load(written + number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :])
                of_state = number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
                after = tl.load(adjoints + of_state)
                leaving = tl.dot(new, after, leaving, input_precision=PRECISION)
                meets = tl.dot(tl.load(states + of_state), tl.trans(after), meets, input_precision=PRECISION)
            left = tl.load(of_tokens + CHUNK)
            unit_k = tl.load(keys)
            leaving *= left[:, None]
            tl.store(out + 5 * CHUNK, tl.sum(leaving * unit_k.to(tl.float32), axis=1))
            value = tl.arange(0, BLOCK)
            meets = tl.where(value[:, None] == value[None, :], meets, 0.0)
            tl.store(met + number, tl.sum(meets))
            total += leaving
            weight = tl.load(weights + number * (CHUNK * CHUNK) + of_square)
            unit_q = tl.load(queries)
            total = tl.dot(tl.trans(weight), unit_q, total, input_precision=PRECISION)
            system = tl.load(inverses + number * (CHUNK * CHUNK) + of_square)
            unit_k = tl.load(keys)
            total = tl.dot(system, unit_k, total, input_precision=PRECISION)
        if L2NORM:
            x = tl.load(tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED), there, other=0.0)
            total = through_norm(x, total)
        tl.store(tile_ptrs(grad_k + k_head * K_DIM, t, grad_k_stride, key, ALIGNED), total, there)
