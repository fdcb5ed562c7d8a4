"""The gated delta rule over whole sequences, chunk by chunk, in two launches.

What the tokens of a chunk write depends on what those before them wrote: a triangular system. `_solve` has all chunks
at once: it inverts their systems, and finds how much of what is written every query reads. `_scan` walks over the
chunks of a row with some rows of one head's state in registers, and writes the outputs. What a chunk's tokens find
missing in the state is all that a step hands on: of it `_solve` has the matrices that give what the state gets and what
the queries read, each in one product. Decays of any strength are exact, by the sums of `ops/_triton/decay.py`. On
Hopper wide heads have kernels of their own: see `hopper_systems.py` and
`ops/_triton/hopper_walk.py`.
"""

import triton
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
from mamba_ops.ops._triton.delta_rule import (
    factor_of_squares,
    halves,
    inverse_of,
    length_factor,
    row_of_both,
    state_offsets,
    times_inverse,
)


@kernel(first_number="scale", static="factors solved")
def _solve(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    slots,
    factors,  # out: (chunks, v_heads, 3, CHUNK), of keys that read, of queries; the chunk's decay
    solved,  # out: (chunks, v_heads, 2 * CHUNK, CHUNK), from what tokens find missing to what the state gets and what
    # queries read: eight rows of either in turn (see `halves`), less what is beyond a row's last part of 16 tokens
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
    SQUARES: tl.constexpr,  # whether lengths of rows are found by matrix products, which read shared memory
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
    factors += number * (3 * CHUNK)
    since = tl.where(decay == decay, tl.exp2(to_log2(total)), decay)  # NaN stays NaN
    tl.store(factors + i, since * of_key)
    tl.store(factors + CHUNK + i, since * of_query)
    tl.store(factors + 2 * CHUNK + i, tl.exp2(to_log2(total + left)), i == 0)  # all of them
    until = tl.exp2(to_log2(left)) * of_key

    between = tl.exp2(tl.where(i[:, None] >= i[None, :], near[:, None] - near[None, :], float("-inf")))
    # With B of strengths and A of products, (1 + B A)^-1 B is B (1 + A B)^-1: a thread has many columns and few rows.
    # What multiplies columns is one product of all, made before strengths would be loaded again where they are needed.
    between *= (down * (of_key * strength))[None, :]
    weight = tl.dot(queries_, turned, input_precision=EXACT) * between * (of_query * up)[:, None]
    weight = weight.to(operand)
    if SQUARES:  # what is to be the right one of a product is put into shared memory now, and frees registers
        weight = tl.trans(weight)
    else:
        system = tl.dot(keys_, turned, input_precision=EXACT)
    inverse = inverse_of(system * between * (of_key * up)[:, None], CHUNK, PRECISION)
    # What is written until the chunk's end, and how much queries read of what is written.
    place = number * (2 * CHUNK * CHUNK) + row_of_both(i)[:, None] * CHUNK + i[None, :]
    is_read = i[:, None] >= i[None, :] // 16 * 16  # the rest is zero
    tl.store(solved + place, inverse * (until * strength)[:, None], is_read)
    if SQUARES:
        weight = tl.trans(tl.dot(tl.trans(inverse.to(operand)), weight, input_precision=EXACT))
    else:
        weight = times_inverse(weight, inverse.to(operand), operand, EXACT, PRECISION)
    tl.store(solved + place + 8 * CHUNK, weight, is_read)


@triton.jit
def _later(pointers, offset, ALIGNED: tl.constexpr):
    # The same entries of tokens that come later. ALIGNED: as of `tile_ptrs`.
    pointers += offset
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def _joined(x, y):
    # Eight rows of each in turn.
    both = tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), [x.shape[0] // 8, 8, 2, x.shape[1]])
    return tl.reshape(tl.permute(both, (0, 2, 1, 3)), [2 * x.shape[0], x.shape[1]])


@kernel(first_number="q_stride", static="factors solved")
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
    JOINED: tl.constexpr,
):
    # JOINED: tokens are the rows of what is multiplied, and values its columns, and what is multiplied by the same is
    # one product: best where matrix units read shared memory. Else values are the rows, and what is multiplied next
    # stays in registers.
    BLOCKS: tl.constexpr = (V_DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    in_value = (value < V_DIM)[None, :]
    in_key = (key < K_DIM)[None, :]

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
    of_state, in_state = state_offsets(
        head, value, key, head_stride, value_stride, key_stride, V_DIM, K_DIM, ALIGNED, JOINED
    )
    carried = in_state & load_flag(row, has_initial_state, initial_stride)
    s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, carried, other=0.0).to(tl.float32)

    operand = solved.dtype.element_ty
    q += head // (V_HEADS // K_HEADS) * K_DIM
    k += head // (V_HEADS // K_HEADS) * K_DIM
    v += head * V_DIM
    before = first.to(tl.int64) * V_HEADS + head
    factors += before * (3 * CHUNK)
    solved += before * (2 * CHUNK * CHUNK)
    at = begin + i
    of_keys = tile_ptrs(k, at, k_stride, key, ALIGNED)
    of_queries = tile_ptrs(q, at, q_stride, key, ALIGNED)
    of_values = tile_ptrs(v, at, v_stride, value, ALIGNED)
    of_output = tile_ptrs(output, at, output_stride, value, ALIGNED)
    of_solved = row_of_both(i)[:, None] * CHUNK + i[None, :]
    is_there = i[:, None] >= i[None, :] // 16 * 16
    row_of_all = tl.arange(0, 2 * CHUNK)
    of_both = row_of_all[:, None] * CHUNK + i[None, :]
    both_there = (row_of_all // 16 * 8 + row_of_all % 8)[:, None] >= i[None, :] // 16 * 16
    for number in range(chunks):
        left = count - number * CHUNK
        there = (i < left)[:, None]
        keys = tl.load(of_keys, there & in_key, other=0.0).to(operand)
        queries = tl.load(of_queries, there & in_key, other=0.0).to(operand)
        values = tl.load(of_values, there & in_value, other=0.0)
        of_key = tl.load(factors + i)
        of_query = tl.load(factors + CHUNK + i)  # this and the decay early, so that they are there in time
        decay = tl.load(factors + 2 * CHUNK)

        known = s.to(operand)
        if JOINED:
            both = tl.load(solved + of_both, both_there, other=0.0)
            found, y = halves(tl.dot(_joined(keys, queries), known, input_precision=PRECISION))
            lacking = values.to(tl.float32) - found * of_key[:, None]
            kept, read = halves(tl.dot(both, lacking.to(operand), input_precision=PRECISION))
            s = tl.dot(tl.trans(keys), kept.to(operand), s * decay, input_precision=PRECISION)
            tl.store(of_output, y * of_query[:, None] + read, there & in_value)
        else:
            lacking = tl.trans(values).to(tl.float32)
            lacking -= tl.dot(known, tl.trans(keys), input_precision=PRECISION) * of_key[None, :]
            y = tl.dot(known, tl.trans(queries), input_precision=PRECISION) * of_query[None, :]
            lacking = lacking.to(operand)
            weight = tl.load(solved + 8 * CHUNK + of_solved, is_there, other=0.0)
            y = tl.trans(tl.dot(lacking, tl.trans(weight), y, input_precision=PRECISION))
            tl.store(of_output, y, there & in_value)  # before the rest, so that registers are free for it
            inverse = tl.load(solved + of_solved, is_there, other=0.0)
            kept = tl.dot(lacking, tl.trans(inverse), input_precision=PRECISION).to(operand)
            s = tl.dot(kept, keys, s * decay, input_precision=PRECISION)
        factors += V_HEADS * 3 * CHUNK
        solved += V_HEADS * 2 * CHUNK * CHUNK
        of_keys = _later(of_keys, k_stride.to(tl.int64) * CHUNK, ALIGNED)
        of_queries = _later(of_queries, q_stride.to(tl.int64) * CHUNK, ALIGNED)
        of_values = _later(of_values, v_stride.to(tl.int64) * CHUNK, ALIGNED)
        of_output = _later(of_output, output_stride.to(tl.int64) * CHUNK, ALIGNED)

    target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
    stored &= slot_stride >= 0
    tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)
