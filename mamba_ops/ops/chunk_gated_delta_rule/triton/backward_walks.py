"""The kernels of the gated delta rule's backward pass that walk over the chunks of a row.

A step is a chain of products, each of which has the one before as its left side, in registers. TURNS: rows of tokens
are turned into columns by a product with the unit matrix, for which matrix units read shared memory, and what is stored
is put in order inside each warp: then no warp waits for another one, but for what is loaded.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import kernel, row_chunks, tile_ptrs
from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_chunks import FACTORS


@triton.jit
def _turned(x, TURNS: tl.constexpr, PRECISION: tl.constexpr):
    # Rows as columns, in float32.
    if TURNS:
        i = tl.arange(0, x.shape[0])
        unit = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(x.dtype)
        x = tl.dot(tl.trans(x), unit, input_precision=PRECISION)
    else:
        x = tl.trans(x).to(tl.float32)
    return x


@triton.jit
def _ordered_tokens(x, TURNS: tl.constexpr):
    # Columns of tokens as the rows that are stored. TURNS: by sixteen of either.
    if TURNS:
        x = tl.permute(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1] // 16, 16]), (3, 0, 2, 1))
    else:
        x = tl.trans(x)
    return x


@triton.jit
def _store_state(place, state, start, key, TURNS: tl.constexpr, HALVES: tl.constexpr):
    # TURNS: by sixteen rows, which are one warp's; HALVES: in two, which take turns in shared memory.
    BLOCK: tl.constexpr = state.shape[0]
    BLOCK_K: tl.constexpr = state.shape[1]
    if TURNS:
        value = start + tl.arange(0, BLOCK // 16)[None, :, None] * 16 + tl.arange(0, 16)[:, None, None]
        if HALVES:
            place += value * BLOCK_K + tl.arange(0, BLOCK_K // 2)[None, None, :]
            first, second = tl.split(tl.permute(tl.reshape(state, [BLOCK // 16, 16, 2, BLOCK_K // 2]), (1, 0, 3, 2)))
            tl.store(place, first)
            tl.store(place + BLOCK_K // 2, second)
        else:
            state = tl.permute(tl.reshape(state, [BLOCK // 16, 16, BLOCK_K]), (1, 0, 2))
            tl.store(place + value * BLOCK_K + key[None, None, :], state)
    else:
        tl.store(place + (start + tl.arange(0, BLOCK))[:, None] * BLOCK_K + key[None, :], state)


@triton.jit
def _tokens_of(CHUNK: tl.constexpr, TURNS: tl.constexpr):
    # The tokens of what `_ordered_tokens` returns.
    if TURNS:
        tokens = tl.arange(0, CHUNK // 16)[None, None, :, None] * 16 + tl.arange(0, 16)[:, None, None, None]
    else:
        tokens = tl.arange(0, CHUNK)[:, None]
    return tokens


@triton.jit
def _values_of_tokens(start, BLOCK: tl.constexpr, TURNS: tl.constexpr):
    # The values of what `_ordered_tokens` returns.
    if TURNS:
        values = start + tl.arange(0, BLOCK // 16)[None, :, None, None] * 16 + tl.arange(0, 16)[None, None, None, :]
    else:
        values = start + tl.arange(0, BLOCK)[None, :]
    return values


@triton.jit
def _ptrs_of_tokens(pointer, t, stride, value, ALIGNED: tl.constexpr, TURNS: tl.constexpr):
    # Where what `_ordered_tokens` returns is stored. ALIGNED: as of `tile_ptrs`.
    pointers = pointer + t.to(tl.int64) * stride + value
    if ALIGNED:
        if TURNS:
            pointers = tl.multiple_of(pointers, (1, 1, 1, 16))
        else:
            pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@kernel(first_number="v_stride", static="keys factors inverses states written")
def _replay(
    v,
    initial_states,
    cu_seqlens,
    keys,
    factors,
    inverses,
    states,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), before each chunk
    written,  # out: (chunks, v_heads, CHUNK, V_PADDED)
    v_stride,
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
    TURNS: tl.constexpr,
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
    factors += number * (FACTORS * CHUNK)
    inverses += number * (CHUNK * CHUNK)
    states += number * (V_PADDED * BLOCK_K)
    written += number * (CHUNK * V_PADDED)
    start = program % BLOCKS * BLOCK
    of_written = _tokens_of(CHUNK, TURNS) * V_PADDED + _values_of_tokens(start, BLOCK, TURNS)
    for chunk in range(chunks):
        t = begin + chunk * CHUNK + i
        k = tl.load(keys + i[:, None] * BLOCK_K + key[None, :])
        inverse = tl.load(inverses + i[:, None] * CHUNK + i[None, :])
        there = (t < begin + count)[:, None] & in_value
        values = tl.load(tile_ptrs(v + head * V_DIM, t, v_stride, value, ALIGNED), there, other=0.0)
        of_values = tl.load(factors + 6 * CHUNK + i)
        of_known = tl.load(factors + 7 * CHUNK + i)
        whole = tl.load(factors + 2 * CHUNK)
        known = s.to(operand)
        _store_state(states, known, start, key, TURNS, False)
        lacking = _turned(values.to(operand), TURNS, PRECISION) * of_values[None, :]
        lacking += tl.dot(known, tl.trans(k), input_precision=PRECISION) * of_known[None, :]
        new = tl.dot(lacking.to(operand), tl.trans(inverse), input_precision=PRECISION)
        tl.store(written + of_written, _ordered_tokens(new.to(operand), TURNS))
        kept = (new * tl.load(factors + CHUNK + i)[None, :]).to(operand)
        s = tl.dot(kept, k, s * whole, input_precision=PRECISION)
        keys += K_HEADS * CHUNK * BLOCK_K
        factors += V_HEADS * FACTORS * CHUNK
        inverses += V_HEADS * CHUNK * CHUNK
        states += V_HEADS * V_PADDED * BLOCK_K
        written += V_HEADS * CHUNK * V_PADDED


@kernel(first_number="grad_stride", static="queries keys factors inverses weights adjoints found")
def _adjoints(
    grad_output,
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
    TURNS: tl.constexpr,
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
    start = program % BLOCKS * BLOCK
    token = _tokens_of(CHUNK, TURNS)
    at_value = _values_of_tokens(start, BLOCK, TURNS)
    of_found = token * V_PADDED + at_value
    grad_v += head * V_DIM
    for chunk in range(chunks):
        t = begin + (chunks - 1 - chunk) * CHUNK + i
        k = tl.load(keys + of_key + i[:, None] * BLOCK_K + key[None, :])
        q = tl.load(queries + of_key + i[:, None] * BLOCK_K + key[None, :])
        square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
        weight = tl.load(weights + square)
        inverse = tl.load(inverses + square)
        there = (t < begin + count)[:, None] & in_value
        grad = tl.load(tile_ptrs(grad_output + head * V_DIM, t, grad_stride, value, ALIGNED), there, other=0.0)
        since = tl.load(factors + number * (FACTORS * CHUNK) + i)
        left = tl.load(factors + number * (FACTORS * CHUNK) + CHUNK + i)
        whole = tl.load(factors + number * (FACTORS * CHUNK) + 2 * CHUNK)
        strength = tl.load(factors + number * (FACTORS * CHUNK) + 6 * CHUNK + i)

        after = grad_s.to(operand)
        _store_state(adjoints + number * (V_PADDED * BLOCK_K), after, start, key, TURNS, True)
        # No product begins with the other one: loads are made ahead for what the sides of a product are made of alone.
        grad = grad.to(operand)
        grad_new = tl.dot(tl.trans(grad), weight, input_precision=PRECISION)
        of_keys = tl.dot(after, tl.trans(k), input_precision=PRECISION)
        grad_new = tl.fma(of_keys, tl.broadcast_to(left[None, :], of_keys.shape), grad_new)
        solved = tl.dot(grad_new.to(operand), inverse, input_precision=PRECISION)
        tl.store(found + number * (CHUNK * V_PADDED) + of_found, _ordered_tokens(solved.to(operand), TURNS))
        later = begin + (chunks - 1 - chunk) * CHUNK + token
        of_grad = _ptrs_of_tokens(grad_v, later, grad_v_stride, at_value, ALIGNED, TURNS)
        solved *= strength[None, :]
        grad_values = _ordered_tokens(solved.to(grad_v.dtype.element_ty), TURNS)
        tl.store(of_grad, grad_values, (later < begin + count) & (at_value < V_DIM))
        turned = (_turned(grad, TURNS, PRECISION) * since[None, :]).to(operand)
        grad_s = tl.dot(turned, q, grad_s * whole, input_precision=PRECISION)
        grad_s = tl.dot((solved * -since[None, :]).to(operand), k, grad_s, input_precision=PRECISION)
        of_key -= K_HEADS * CHUNK * BLOCK_K
        number -= V_HEADS
    if grad_initial_states is not None:
        tl.store(grad_initial_states + of_row, grad_s, in_state)
