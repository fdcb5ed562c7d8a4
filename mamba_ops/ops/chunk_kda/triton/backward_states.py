"""The kernels of chunk_kda's backward pass that find what goes by way of states; its formulas are in the reference."""

import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, row_chunks, tile_ptrs
from mamba_ops.ops._triton.delta_rule import load_numbers, row_of_both
from mamba_ops.ops.chunk_kda.triton.pairs import load_decays


@kernel(first_number="grad_stride", static="keyed whole inverses weights adjoints found")
def _adjoints(
    grad_output,
    grad_final_states,
    beta,
    cu_seqlens,
    keyed,
    whole,
    inverses,
    weights,
    adjoints,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), of the state after each chunk
    found,  # out: (chunks, v_heads, CHUNK, V_PADDED), of what tokens find missing, by their strength
    grad_initial_states,
    grad_stride,
    beta_stride,
    length,
    rows,
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
    # Walks over the chunks of a row from the last one on.
    BLOCKS: tl.constexpr = V_PADDED // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    in_value = (value < V_DIM)[None, :]
    in_state = (value < V_DIM)[:, None] & (key < K_DIM)[None, :]
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    of_row = (row.to(tl.int64) * V_HEADS + head) * (V_DIM * K_DIM) + value[:, None] * K_DIM + key[None, :]

    grad_s = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    if grad_final_states is not None:
        grad_s = tl.load(grad_final_states + of_row, in_state, other=0.0).to(tl.float32)
    operand = weights.dtype.element_ty
    number = (first + chunks - 1).to(tl.int64) * V_HEADS + head
    of_key = i[:, None] * BLOCK_K + key[None, :]
    of_reader = row_of_both(i)[:, None] * BLOCK_K + key[None, :]
    for chunk in range(chunks):
        t = begin + (chunks - 1 - chunk) * CHUNK + i
        is_token = (t < begin + count)[:, None]
        of_chunk = keyed + number * (4 * CHUNK * BLOCK_K)
        through = tl.load(of_chunk + of_reader, is_token, other=0.0)
        queries = tl.load(of_chunk + 8 * BLOCK_K + of_reader, is_token, other=0.0)
        keys = tl.load(of_chunk + 2 * CHUNK * BLOCK_K + of_key, is_token, other=0.0)
        inverse = tl.load(inverses + number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :])
        strength = load_numbers(beta, head, t, beta_stride, begin + count)
        weight = tl.load(weights + number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :], is_token, other=0.0)
        there = is_token & in_value
        grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
        decay = tl.load(whole + number * BLOCK_K + key)

        after = grad_s.to(operand)
        tl.store(adjoints + number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :], after)
        turned = tl.trans(grad.to(operand))
        grad_new = tl.dot(after, tl.trans(keys), input_precision=PRECISION)
        grad_new = tl.dot(turned, weight, grad_new, input_precision=PRECISION).to(operand)
        solved = tl.dot(grad_new, inverse, input_precision=PRECISION)
        tl.store(found + number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :], tl.trans(solved))
        grad_s = tl.dot(turned, queries, grad_s * decay[None, :], input_precision=PRECISION)
        grad_s -= tl.dot((solved * strength[None, :]).to(operand), through, input_precision=PRECISION)
        number -= V_HEADS
    if grad_initial_states is not None:
        tl.store(grad_initial_states + of_row, grad_s, in_state)


@kernel(first_number="v_stride", static="system inverses written found weights numbers")
def _products(
    v,
    beta,
    grad_output,
    cu_seqlens,
    system,
    inverses,  # out: the gradients of the decayed products of keys
    written,
    found,
    weights,  # out: the gradients of the products of queries and keys
    numbers,  # out: (chunks, v_heads, CHUNK), a part of the gradient of beta
    grad_v,
    v_stride,
    beta_stride,
    grad_stride,
    grad_v_stride,
    length,
    rows,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    operand = written.dtype.element_ty
    number = chunk.to(tl.int64) * V_HEADS + head
    i = tl.arange(0, CHUNK)
    t = low + i
    square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    strength = load_numbers(beta, head, t, beta_stride, high)
    grad_weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    grad_system = tl.zeros([CHUNK, CHUNK], tl.float32)
    given = tl.zeros([CHUNK], tl.float32)
    for start in range(0, V_PADDED, BLOCK):
        value = start + tl.arange(0, BLOCK)
        there = (t < high)[:, None] & (value < V_DIM)[None, :]
        of_values = number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
        new = tl.trans(tl.load(written + of_values))
        solved = tl.load(found + of_values)
        place = tile_ptrs(grad_v + head * V_DIM, t, grad_v_stride, value, ALIGNED)
        tl.store(place, solved.to(tl.float32) * strength[:, None], there)
        values = tl.load(tile_ptrs(v + head * V_DIM, t, v_stride, value, ALIGNED), there, other=0.0)
        given += tl.sum(solved.to(tl.float32) * values.to(tl.float32), axis=1)
        grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
        grad_weights = tl.dot(grad.to(operand), new, grad_weights, input_precision=PRECISION)
        grad_system = tl.dot(solved, new, grad_system, input_precision=PRECISION)
    tl.store(weights + square, tl.where(i[:, None] >= i[None, :], grad_weights, 0.0))
    is_earlier = (i[:, None] > i[None, :]) & (t < high)[:, None]
    grad_system = tl.where(is_earlier, -grad_system, 0.0)
    given += tl.sum(grad_system * tl.load(system + square, is_earlier, other=0.0), axis=1)
    tl.store(numbers + number * CHUNK + i, given)
    tl.store(inverses + square, grad_system * strength[:, None])


@kernel(first_number="q_stride", static="factors states adjoints written found numbers grad_queries grad_keys decays")
def _reads(
    q,
    k,
    g,
    beta,
    grad_output,
    cu_seqlens,
    factors,
    states,
    adjoints,
    written,
    found,
    numbers,
    grad_queries,  # out: (chunks, v_heads, CHUNK, BLOCK_K), by way of the state before the chunk
    grad_keys,  # out: likewise, and by way of the state after it
    decays,  # out: likewise, of the logs of decays
    grad_beta,
    q_stride,
    k_stride,
    g_stride,
    beta_stride,
    grad_stride,
    grad_beta_stride,
    length,
    rows,
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
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    SUMS: tl.constexpr,
):
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    operand = states.dtype.element_ty
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    g += head * K_DIM
    number = chunk.to(tl.int64) * V_HEADS + head
    i = tl.arange(0, CHUNK)
    t = low + i
    strength = load_numbers(beta, head, t, beta_stride, high)
    factors += number * (2 * CHUNK) + i
    of_key = tl.load(factors, t < high, other=0.0)
    of_query = tl.load(factors + CHUNK, t < high, other=0.0)
    knows = tl.zeros([CHUNK], tl.float32)
    for start in range(0, BLOCK_K, BLOCK):
        key = start + tl.arange(0, BLOCK)
        in_key = key < K_DIM
        read = tl.zeros([CHUNK, BLOCK], tl.float32)
        known = tl.zeros([CHUNK, BLOCK], tl.float32)
        left = tl.zeros([CHUNK, BLOCK], tl.float32)
        met = tl.zeros([BLOCK], tl.float32)
        for start_v in range(0, V_PADDED, BLOCK_V):
            value = start_v + tl.arange(0, BLOCK_V)
            there = (t < high)[:, None] & (value < V_DIM)[None, :]
            of_values = number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
            of_state = number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
            grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
            before = tl.load(states + of_state)
            after = tl.load(adjoints + of_state)
            met += tl.sum(before.to(tl.float32) * after.to(tl.float32), axis=0)
            read = tl.dot(grad.to(operand), before, read, input_precision=PRECISION)
            known = tl.dot(tl.load(found + of_values), before, known, input_precision=PRECISION)
            left = tl.dot(tl.load(written + of_values), after, left, input_precision=PRECISION)
        there = (t < high)[:, None] & in_key[None, :]
        queries = tl.load(tile_ptrs(q, t, q_stride, key, ALIGNED), there, other=0.0).to(tl.float32) * of_query[:, None]
        keys = tl.load(tile_ptrs(k, t, k_stride, key, ALIGNED), there, other=0.0).to(tl.float32) * of_key[:, None]
        total = tl.cumsum(load_decays(g, t, low, high, g_stride, key, in_key, ALIGNED), 0)
        later = load_decays(g, t + 1, low, tl.minimum(low + CHUNK, high), g_stride, key, in_key, ALIGNED)
        read *= tl.exp2(total)
        known *= tl.exp2(total)
        left *= tl.exp2(tl.cumsum(later, 0, reverse=True))
        knows += tl.sum(known * keys, axis=1)
        known *= -strength[:, None]
        place = number * (CHUNK * BLOCK_K) + i[:, None] * BLOCK_K + key[None, :]
        tl.store(grad_queries + place, read)
        tl.store(grad_keys + place, known + left)
        # A decay is in what its token and those after it read, in what those before it leave, and in the whole.
        from_on = (i[:, None] <= i[None, :]).to(tl.float32)
        before_it = (i[:, None] > i[None, :]).to(tl.float32)
        whole = tl.exp2(tl.sum(tl.where(i[:, None] == CHUNK - 1, total, 0.0), axis=0))
        of_decays = tl.dot(from_on, read * queries + known * keys, input_precision=SUMS)
        of_decays = tl.dot(before_it, left * keys, of_decays, input_precision=SUMS)
        tl.store(decays + place, of_decays + (whole * met)[None, :])
    given = tl.load(numbers + number * CHUNK + i)
    tl.store(grad_beta + head + t.to(tl.int64) * grad_beta_stride, given - knows, t < high)
