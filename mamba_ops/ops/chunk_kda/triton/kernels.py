"""Kimi Delta Attention over whole sequences, chunk by chunk, in five launches.

`_decay`, `_steep_pairs` and `_pairs` find what tokens of a chunk keep of each other, and decay keys and queries from
their chunk's beginning and to its end (see pairs.py). `_solve` inverts the chunks' systems. `_scan` walks over the
chunks of a row with some rows of one head's state in registers, and writes the outputs.
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
from mamba_ops.ops._triton.delta_rule import _PART, load_numbers


@triton.jit
def _quarters(x):
    # Of a lower triangular square: the first on its diagonal, the one below that, and the last.
    HALF: tl.constexpr = x.shape[0] // 2
    x = tl.permute(tl.reshape(x, [2, HALF, 2, HALF]), (1, 3, 0, 2))
    left, right = tl.split(x)
    first, below = tl.split(left)
    _, last = tl.split(right)
    return first, below, last


@triton.jit
def _square(first, below, last):
    # The square of these quarters, with zeros above the diagonal.
    left = tl.join(first, below)
    right = tl.join(tl.zeros_like(last), last)
    x = tl.permute(tl.join(left, right), (2, 0, 3, 1))
    return tl.reshape(x, [2 * first.shape[0], 2 * first.shape[0]])


@triton.jit
def _joined(first, below, last, PRECISION: tl.constexpr):
    # The inverse of a lower triangular square, given its quarter below the diagonal and the inverses of those on it.
    # The first product is turned: else triton-xpu 3.3.0b1 gives a square of squares two layouts.
    below = tl.trans(tl.dot(tl.trans(first), tl.trans(below), input_precision=PRECISION))
    below = tl.dot(last, below, input_precision=PRECISION)
    return _square(first, -below, last)


@triton.jit
def inverse_by_quarters(system, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    # Of 1 + system, which is strictly lower triangular. First of the four parts on its diagonal, all at once, row by
    # row; then of the two squares of two parts, and of the whole. The gated delta rule's kernels, which keep more in
    # registers, have `delta_rule.inverse_of`: with this one they took 308 instead of 246 us for 4096 tokens on an H200.
    tl.static_assert(CHUNK == 4 * _PART)
    first, below, last = _quarters(system)
    part_0, below_0, part_1 = _quarters(first)
    part_2, below_1, part_3 = _quarters(last)
    part = tl.join(tl.join(part_0, part_2), tl.join(part_1, part_3))
    part = tl.reshape(part, [_PART, _PART, 4])
    row = tl.arange(0, _PART)[:, None, None]
    column = tl.arange(0, _PART)[None, :, None]
    solved = tl.where(row == column, 1.0, part * 0.0)
    for j in tl.static_range(1, _PART):
        factors = tl.sum(tl.where(row == j, part, 0.0), axis=0)
        known = tl.sum(factors[:, None, :] * solved, axis=0)
        solved -= tl.where(row == j, known[None, :, :], 0.0)
    left, right = tl.split(tl.reshape(solved, [_PART, _PART, 2, 2]))
    part_0, part_2 = tl.split(left)
    part_1, part_3 = tl.split(right)
    first = _joined(part_0, below_0, part_1, PRECISION)
    last = _joined(part_2, below_1, part_3, PRECISION)
    return _joined(first, below, last, PRECISION)


@kernel(first_number="beta_stride", static="system inverses")
def _solve(
    beta,
    cu_seqlens,
    slots,
    system,
    inverses,  # out: (chunks, v_heads, CHUNK, CHUNK), of the systems
    beta_stride,
    slots_stride,
    length,
    rows,
    null_slot,
    slot_count,
    V_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if row >= rows:
        return
    if load_slot(row, slots, slots_stride, null_slot, slot_count) < 0:
        return
    i = tl.arange(0, CHUNK)
    square = (chunk.to(tl.int64) * V_HEADS + head) * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    known = tl.load(system + square, (low + i < high)[:, None], other=0.0)
    strength = load_numbers(beta, head, low + i, beta_stride, high)
    known = tl.where(i[:, None] > i[None, :], known * strength[:, None], 0.0)
    tl.store(inverses + square, inverse_by_quarters(known, CHUNK, PRECISION))


@kernel(first_number="v_stride", static="keyed whole inverses weights states written")
def _scan(
    v,
    beta,
    cu_seqlens,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    output,  # None: neither outputs nor last states are stored
    keyed,
    whole,
    inverses,
    weights,
    states,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), before each chunk; None: they are not kept
    written,  # out: (chunks, v_heads, CHUNK, V_PADDED), what tokens write; None likewise
    v_stride,
    beta_stride,
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
    AHEAD: tl.constexpr,  # whether a chunk reads for the next one what is no operand of a product; Triton does the rest
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

    if output is not None:
        output += head * V_DIM
    rows = tl.num_programs(0) // (BLOCKS * V_HEADS)
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        if output is not None:
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
    if states is None:
        carried = in_state & load_flag(row, has_initial_state, initial_stride)
    else:  # for a backward pass: all rows have one, or none has
        carried = in_state & (slot_stride >= 0)
    s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, carried, other=0.0).to(tl.float32)

    operand = keyed.dtype.element_ty
    before = first.to(tl.int64) * V_HEADS + head
    v += head * V_DIM
    keyed += before * (4 * CHUNK * BLOCK_K)
    whole += before * BLOCK_K
    inverses += before * (CHUNK * CHUNK)
    weights += before * (CHUNK * CHUNK)
    if states is not None:
        states += before * (V_PADDED * BLOCK_K) + value[:, None] * BLOCK_K + key[None, :]
        written += before * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
    of_key = i[:, None] * BLOCK_K + key[None, :]
    end = begin + count
    if AHEAD:
        t = begin + i
        next_values = tl.load(tile_ptrs(v, t, v_stride, value, ALIGNED), (t < end)[:, None] & in_value, other=0.0)
        next_strength = load_numbers(beta, head, t, beta_stride, end)
        next_decay = tl.load(whole + key, (key < BLOCK_K) & (chunks > 0), other=0.0)
    for number in range(chunks):
        t = begin + number * CHUNK + i
        is_token = (t < end)[:, None]
        through = tl.load(keyed + of_key, is_token, other=0.0)
        keys = tl.load(keyed + 2 * CHUNK * BLOCK_K + of_key, is_token, other=0.0)
        inverse = tl.load(inverses + i[:, None] * CHUNK + i[None, :])
        if AHEAD:
            values, strength, decay = next_values, next_strength, next_decay
            later = t + CHUNK
            there = (later < end)[:, None] & in_value
            whole += V_HEADS * BLOCK_K
            next_values = tl.load(tile_ptrs(v, later, v_stride, value, ALIGNED), there, other=0.0)
            next_strength = load_numbers(beta, head, later, beta_stride, end)
            next_decay = tl.load(whole + key, (key < BLOCK_K) & (number + 1 < chunks), other=0.0)
        else:
            values = tl.load(tile_ptrs(v, t, v_stride, value, ALIGNED), is_token & in_value, other=0.0)
            strength = load_numbers(beta, head, t, beta_stride, end)
            decay = tl.load(whole + key)
            whole += V_HEADS * BLOCK_K
        known = s.to(operand)
        if output is not None:
            queries = tl.load(keyed + CHUNK * BLOCK_K + of_key, is_token, other=0.0)
            weight = tl.load(weights + i[:, None] * CHUNK + i[None, :])
            y = tl.dot(known, tl.trans(queries), input_precision=PRECISION)
        new = tl.trans(values).to(tl.float32) - tl.dot(known, tl.trans(through), input_precision=PRECISION)
        new = (new * strength[None, :]).to(operand)
        new = tl.dot(new, tl.trans(inverse), input_precision=PRECISION).to(operand)
        s = tl.dot(new, keys, s * decay[None, :], input_precision=PRECISION)
        if output is not None:
            y = tl.dot(new, tl.trans(weight), y, input_precision=PRECISION)
            tl.store(tile_ptrs(output, t, output_stride, value, ALIGNED), tl.trans(y), is_token & in_value)
        if states is not None:
            tl.store(states, known)
            tl.store(written, tl.trans(new))
            states += V_HEADS * V_PADDED * BLOCK_K
            written += V_HEADS * CHUNK * V_PADDED
        keyed += V_HEADS * 4 * CHUNK * BLOCK_K
        inverses += V_HEADS * CHUNK * CHUNK
        weights += V_HEADS * CHUNK * CHUNK

    if output is not None:
        target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
        stored &= slot_stride >= 0
        tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)
