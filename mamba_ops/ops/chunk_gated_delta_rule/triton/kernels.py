"""The gated delta rule over whole sequences, chunk by chunk, in two launches.

What the tokens of a chunk write depends on what those before them wrote: a triangular system. `_solve` has all chunks
at once: it inverts their systems, and finds how much of what is written every query reads. `_scan` walks over the
chunks of a row with some rows of one head's state in registers, where what is multiplied next stays, and writes the
outputs. Decays of any strength are exact, by the sums of `ops/_triton/decay.py`.
"""

import triton.language as tl

from mamba_ops.ops._triton.common import (
    chunk_bounds,
    final_slot,
    kernel,
    load_flag,
    load_slot,
    offset_ptr,
    row_chunks,
    tile_ptrs,
)
from mamba_ops.ops._triton.decay import exact_sums, split, to_log2
from mamba_ops.ops._triton.delta_rule import factor_of_squares, inverse_of, length_factor


@kernel(first_number="scale", static="factors solved weights")
def _solve(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    slots,
    factors,  # out: (chunks, v_heads, 4, CHUNK), of keys that read, of queries, of keys that write; the chunk's decay
    solved,  # out: (chunks, v_heads, CHUNK, CHUNK), the inverse of the chunk's system, times beta
    weights,  # out: (chunks, v_heads, CHUNK, CHUNK), how strength queries read of what each token writes
    scale,
    q_stride,  # this and the next three: from token to token
    k_stride,
    g_stride,
    beta_stride,
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
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    SQUARES: tl.constexpr,  # whether lengths of rows are found by matrix products
):
    program = tl.program_id(0)
    chunk = program // V_HEADS
    head = program % V_HEADS
    k_head = head // (V_HEADS // K_HEADS)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    t = low + i
    there = (t < high)[:, None] & (key < K_DIM)[None, :]
    operand = solved.dtype.element_ty
    keys = tl.load(tile_ptrs(k + k_head * K_DIM, t, k_stride, key, ALIGNED), there, other=0.0)
    queries = tl.load(tile_ptrs(q + k_head * K_DIM, t, q_stride, key, ALIGNED), there, other=0.0)
    strength = tl.load(beta + head + t.to(tl.int64) * beta_stride, t < high, other=0.0).to(tl.float32)
    decay = tl.load(g + head + t.to(tl.int64) * g_stride, t < high, other=0.0).to(tl.float32) * 1.4426950408889634

    keys_, queries_ = keys.to(operand), queries.to(operand)
    turned = tl.trans(keys_)
    if SQUARES:
        system = tl.dot(keys_, turned, input_precision=EXACT)
        of_key = factor_of_squares(system, L2NORM)
        squares = tl.dot(queries_, tl.trans(queries_), input_precision=EXACT)
        of_query = factor_of_squares(squares, L2NORM) * scale
    else:
        of_key = length_factor(keys, L2NORM)
        of_query = length_factor(queries, L2NORM) * scale
    total, left = exact_sums(decay)
    near, up, down = split(total)
    number = chunk.to(tl.int64) * V_HEADS + head
    factors += number * (4 * CHUNK)
    since = tl.where(decay == decay, tl.exp2(to_log2(total)), decay)  # NaN stays NaN
    tl.store(factors + i, since * of_key)
    tl.store(factors + CHUNK + i, since * of_query)
    tl.store(factors + 2 * CHUNK + i, tl.exp2(to_log2(left)) * of_key)
    tl.store(factors + 3 * CHUNK + i, tl.exp2(to_log2(total + left)), i == 0)  # all of them

    between = tl.exp2(tl.where(i[:, None] >= i[None, :], near[:, None] - near[None, :], float("-inf")))
    place = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    weight = tl.dot(queries_, turned, input_precision=EXACT)
    weight = weight * (between * (down * of_key)[None, :]) * (of_query * up)[:, None]
    tl.store(weights + place, weight)
    if not SQUARES:
        system = tl.dot(keys_, turned, input_precision=EXACT)
    # With B of strengths and A of products, (1 + B A)^-1 B is B (1 + A B)^-1: a thread has many columns and few rows.
    # What multiplies columns is one product of all, made before strengths would be loaded again where they are needed.
    system = system * (between * (down * (of_key * strength))[None, :]) * (of_key * up)[:, None]
    tl.store(solved + place, inverse_of(system, CHUNK, PRECISION) * strength[:, None])


@kernel(first_number="q_stride", static="factors solved weights")
def _scan(
    q,
    k,
    v,
    cu_seqlens,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    output,
    factors,
    solved,
    weights,
    q_stride,
    k_stride,
    v_stride,
    output_stride,
    slots_stride,
    write_stride,
    initial_stride,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    value_stride,
    key_stride,
    length,
    null_slot,
    slot_count,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS: tl.constexpr = (V_DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    in_value = (value < V_DIM)[None, :]
    in_key = (key < K_DIM)[None, :]
    in_state = (value < V_DIM)[:, None] & in_key

    output += head * V_DIM
    rows = tl.num_programs(0) // (BLOCKS * V_HEADS)
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        for number in range(chunks):
            t = begin + number * CHUNK + i
            place = tile_ptrs(output, t, output_stride, value, ALIGNED)
            tl.store(place, tl.zeros([CHUNK, BLOCK], tl.float32), (t < begin + count)[:, None] & in_value)
        return
    if ALIGNED:
        of_state = (head * V_DIM + value)[:, None] * K_DIM + key[None, :]
    else:
        of_state = value.to(tl.int64)[:, None] * value_stride + key.to(tl.int64)[None, :] * key_stride
        of_state += head.to(tl.int64) * head_stride
    carried = in_state & load_flag(row, has_initial_state, initial_stride)
    s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, carried, other=0.0).to(tl.float32)

    operand = solved.dtype.element_ty
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    v += head * V_DIM
    before = first.to(tl.int64) * V_HEADS + head
    factors += before * (4 * CHUNK)
    solved += before * (CHUNK * CHUNK)
    weights += before * (CHUNK * CHUNK)
    square = i[:, None] * CHUNK + i[None, :]
    for number in range(chunks):
        t = begin + number * CHUNK + i
        there = (t < begin + count)[:, None]
        keys = tl.load(tile_ptrs(k, t, k_stride, key, ALIGNED), there & in_key, other=0.0).to(operand)
        queries = tl.load(tile_ptrs(q, t, q_stride, key, ALIGNED), there & in_key, other=0.0).to(operand)
        values = tl.load(tile_ptrs(v, t, v_stride, value, ALIGNED), there & in_value, other=0.0)
        inverse = tl.load(solved + square)
        weight = tl.load(weights + square)

        query_factor = tl.load(factors + CHUNK + i)  # this and the decay early, so that they are there in time
        decay = tl.load(factors + 3 * CHUNK)

        known = s.to(operand)
        new = tl.trans(values).to(tl.float32)
        new -= tl.dot(known, tl.trans(keys), input_precision=PRECISION) * tl.load(factors + i)[None, :]
        y = tl.dot(known, tl.trans(queries), input_precision=PRECISION) * query_factor[None, :]
        new = tl.dot(new.to(operand), tl.trans(inverse), input_precision=PRECISION)
        kept = (new * tl.load(factors + 2 * CHUNK + i)[None, :]).to(operand)
        s = tl.dot(kept, keys, s * decay, input_precision=PRECISION)
        y = tl.dot(new.to(operand), tl.trans(weight), y, input_precision=PRECISION)
        tl.store(tile_ptrs(output, t, output_stride, value, ALIGNED), tl.trans(y), there & in_value)
        factors += V_HEADS * 4 * CHUNK
        solved += V_HEADS * CHUNK * CHUNK
        weights += V_HEADS * CHUNK * CHUNK

    target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
    stored &= slot_stride >= 0
    tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)
