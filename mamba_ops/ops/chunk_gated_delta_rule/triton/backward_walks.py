"""The kernels of the gated delta rule's backward pass that walk over the chunks of a row."""

import triton.language as tl

from mamba_ops.ops._triton.common import kernel, row_chunks, tile_ptrs
from mamba_ops.ops._triton.delta_rule import load_numbers


@kernel(first_number="v_stride", static="keys factors inverses states written")
def _replay(
    v,
    beta,
    initial_states,
    cu_seqlens,
    keys,
    factors,
    inverses,
    states,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), before each chunk
    written,  # out: (chunks, v_heads, CHUNK, V_PADDED)
    v_stride,
    beta_stride,
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
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)

    s = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    if initial_states is not None:
        of_row = (row.to(tl.int64) * V_HEADS + head) * (V_DIM * K_DIM) + value[:, None] * K_DIM + key[None, :]
        s = tl.load(initial_states + of_row, (value < V_DIM)[:, None] & (key < K_DIM)[None, :], other=0.0)
        s = s.to(tl.float32)
    operand = inverses.dtype.element_ty
    number = first.to(tl.int64) * V_HEADS + head
    keys += (first.to(tl.int64) * K_HEADS + head // (V_HEADS // K_HEADS)) * (CHUNK * BLOCK_K)
    factors += number * (6 * CHUNK)
    inverses += number * (CHUNK * CHUNK)
    states += number * (V_PADDED * BLOCK_K)
    written += number * (CHUNK * V_PADDED)
    for chunk in range(chunks):
        t = begin + chunk * CHUNK + i
        k = tl.load(keys + i[:, None] * BLOCK_K + key[None, :])
        inverse = tl.load(inverses + i[:, None] * CHUNK + i[None, :])
        there = (t < begin + count)[:, None] & in_value
        values = tl.load(tile_ptrs(v + head * V_DIM, t, v_stride, value, ALIGNED), there, other=0.0)
        strength = load_numbers(beta, head, t, beta_stride, begin + count)
        known = s.to(operand)
        tl.store(states + value[:, None] * BLOCK_K + key[None, :], known)
        lacking = tl.trans(values).to(tl.float32)
        lacking -= tl.dot(known, tl.trans(k), input_precision=PRECISION) * tl.load(factors + i)[None, :]
        new = tl.dot((lacking * strength[None, :]).to(operand), tl.trans(inverse), input_precision=PRECISION)
        tl.store(written + i[:, None] * V_PADDED + value[None, :], tl.trans(new).to(operand))
        kept = (new * tl.load(factors + CHUNK + i)[None, :]).to(operand)
        s = tl.dot(kept, k, s * tl.load(factors + 2 * CHUNK), input_precision=PRECISION)
        keys += K_HEADS * CHUNK * BLOCK_K
        factors += V_HEADS * 6 * CHUNK
        inverses += V_HEADS * CHUNK * CHUNK
        states += V_HEADS * V_PADDED * BLOCK_K
        written += V_HEADS * CHUNK * V_PADDED


@kernel(first_number="grad_stride", static="queries keys factors inverses weights adjoints found")
def _adjoints(
    grad_output,
    beta,
    grad_final_states,
    cu_seqlens,
    queries,
    keys,
    factors,
    inverses,
    weights,
    adjoints,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), of the state after each chunk
    found,  # out: (chunks, v_heads, CHUNK, V_PADDED), of what tokens find missing, by their strength
    grad_v,
    grad_initial_states,
    grad_stride,
    beta_stride,
    grad_v_stride,
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
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    of_row = (row.to(tl.int64) * V_HEADS + head) * (V_DIM * K_DIM) + value[:, None] * K_DIM + key[None, :]

    grad_s = tl.zeros([BLOCK, BLOCK_K], tl.float32)
    if grad_final_states is not None:
        grad_s = tl.load(grad_final_states + of_row, in_state, other=0.0).to(tl.float32)
    operand = inverses.dtype.element_ty
    last = (first + chunks - 1).to(tl.int64)
    of_key = (last * K_HEADS + head // (V_HEADS // K_HEADS)) * (CHUNK * BLOCK_K)
    number = last * V_HEADS + head
    for chunk in range(chunks):
        t = begin + (chunks - 1 - chunk) * CHUNK + i
        k = tl.load(keys + of_key + i[:, None] * BLOCK_K + key[None, :])
        q = tl.load(queries + of_key + i[:, None] * BLOCK_K + key[None, :])
        square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
        weight = tl.load(weights + square)
        inverse = tl.load(inverses + square)
        there = (t < begin + count)[:, None] & in_value
        grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
        strength = load_numbers(beta, head, t, beta_stride, begin + count)
        since = tl.load(factors + number * (6 * CHUNK) + i)
        left = tl.load(factors + number * (6 * CHUNK) + CHUNK + i)
        whole = tl.load(factors + number * (6 * CHUNK) + 2 * CHUNK)

        after = grad_s.to(operand)
        tl.store(adjoints + number * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :], after)
        turned = tl.trans(grad).to(tl.float32)
        grad_new = tl.dot(after, tl.trans(k), input_precision=PRECISION) * left[None, :]
        grad_new = tl.dot(turned.to(operand), weight, grad_new, input_precision=PRECISION)
        solved = tl.dot(grad_new.to(operand), inverse, input_precision=PRECISION)
        tl.store(found + number * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :], tl.trans(solved))
        solved *= strength[None, :]
        tl.store(tile_ptrs(grad_v + head * V_DIM, t, grad_v_stride, value, ALIGNED), tl.trans(solved), there)
        grad_s = tl.dot((turned * since[None, :]).to(operand), q, grad_s * whole, input_precision=PRECISION)
        grad_s -= tl.dot((solved * since[None, :]).to(operand), k, input_precision=PRECISION)
        of_key -= K_HEADS * CHUNK * BLOCK_K
        number -= V_HEADS
    if grad_initial_states is not None:
        tl.store(grad_initial_states + of_row, grad_s, in_state)
