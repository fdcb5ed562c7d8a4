"""Kimi Delta Attention over whole sequences, chunk by chunk, in four launches.

`_decay` decays keys and queries from their chunk's beginning and to its end, and `_steep_pairs` finds what tokens of a
chunk keep of each other where that is little (see pairs.py). `_solve` multiplies the rest, and inverts the chunks'
systems. `_scan` walks over the chunks of a row with some values of one head's state in registers, and writes the
outputs. What a chunk's tokens find missing in the state is all that a step hands on: of it `_solve` has the matrices
that give what tokens write and what queries read of that, each in one product. On Hopper another kernel walks over wide
heads: see `ops/_triton/hopper_walk.py`.
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
from mamba_ops.ops._triton.delta_rule import halves, inverse_of, load_numbers, row_of_both, state_offsets, times_inverse


@triton.jit
def _products_of(
    readers, given, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    # Of a chunk's keys or queries, from where they are, and its keys divided by their decay.
    i = tl.arange(0, CHUNK)[:, None]
    key = tl.arange(0, BLOCK)[None, :]
    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in range(0, BLOCK_K, BLOCK):
        x = tl.load(readers + row_of_both(i) * BLOCK_K + first + key)
        products = tl.dot(x, tl.trans(tl.load(given + i * BLOCK_K + first + key)), products, input_precision=PRECISION)
    return products


@kernel(first_number="beta_stride", static="steep keyed system inverses weights solved")
def _solve(
    beta,
    cu_seqlens,
    steep,
    keyed,
    system,  # in: of steep blocks of channels; out, as the next two only for a backward pass: (chunks, v_heads, CHUNK,
    # CHUNK), decayed products of keys, only below the diagonal
    inverses,  # out: likewise, of the systems; None: neither these nor the next are kept
    weights,  # out: likewise, how strength queries read of what each token writes; zero above the diagonal
    solved,  # out: (chunks, v_heads, 2 * CHUNK, CHUNK), from what tokens find missing to what they write and what
    # queries read of that: eight rows of either in turn, less what is beyond a row's last part of 16 tokens
    beta_stride,
    length,
    rows,
    V_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)  # of a chunk and a head
    blocks = tl.load(steep + number)
    if blocks < 0:
        return
    head = tl.program_id(0) % V_HEADS
    _, low, high, _, _ = chunk_bounds(tl.program_id(0) // V_HEADS, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    i = tl.arange(0, CHUNK)
    strength = load_numbers(beta, head, low + i, beta_stride, high)
    operand = solved.dtype.element_ty
    keyed += number * (4 * CHUNK * BLOCK_K)
    square = number * (CHUNK * CHUNK) + i[:, None] * CHUNK + i[None, :]
    is_later = i[:, None] > i[None, :]
    given = keyed + 3 * CHUNK * BLOCK_K
    known = _products_of(keyed, given, CHUNK, BLOCK_K, BLOCK, EXACT)
    if blocks > 0:
        known += tl.load(system + square)
    # With B of strengths and A of products, (1 + B A)^-1 B is B (1 + A B)^-1: a thread has many columns and few rows.
    if inverses is None:
        inverse = inverse_of(known * strength[None, :], CHUNK, PRECISION) * strength[:, None]
    else:
        tl.store(system + square, known, is_later)  # what is read there below is not
        inverse = inverse_of(known * strength[:, None], CHUNK, PRECISION)
        tl.store(inverses + square, inverse)
        inverse *= strength[None, :]
    inverse = inverse.to(operand)
    # After the inverse, which needs the registers.
    weight = _products_of(keyed + 8 * BLOCK_K, given, CHUNK, BLOCK_K, BLOCK, EXACT)
    if blocks > 0:
        weight += tl.trans(tl.load(system + square))
    weight = tl.where(i[:, None] >= i[None, :], weight, 0.0).to(operand)
    if inverses is not None:
        tl.store(weights + square, weight)
    place = number * (2 * CHUNK * CHUNK) + row_of_both(i)[:, None] * CHUNK + i[None, :]
    is_read = i[:, None] >= i[None, :] // 16 * 16  # the rest is zero
    tl.store(solved + place, inverse, is_read)
    tl.store(solved + place + 8 * CHUNK, times_inverse(weight, inverse, operand, EXACT, PRECISION), is_read)


@kernel(first_number="v_stride", static="keyed whole solved states written")
def _scan(
    v,
    cu_seqlens,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    output,  # None: neither outputs nor last states are stored
    keyed,
    whole,
    solved,
    states,  # out: (chunks, v_heads, V_PADDED, BLOCK_K), before each chunk; None: they are not kept
    written,  # out: (chunks, v_heads, CHUNK, V_PADDED), what tokens write; None likewise
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
    JOINED: tl.constexpr,
):
    # JOINED: tokens are the rows of what is multiplied, and values its columns, and what is multiplied by the same is
    # one product: best where matrix units read shared memory. Else values are the rows, and what is multiplied next
    # stays in registers.
    BLOCKS: tl.constexpr = V_PADDED // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * V_HEADS)
    head = program // BLOCKS % V_HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    key = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    in_value = (value < V_DIM)[None, :]

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
    of_state, in_state = state_offsets(
        head, value, key, head_stride, value_stride, key_stride, V_DIM, K_DIM, ALIGNED, JOINED
    )
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
    solved += before * (2 * CHUNK * CHUNK)
    if states is not None:
        states += before * (V_PADDED * BLOCK_K)
        if JOINED:
            states += value[None, :] * BLOCK_K + key[:, None]
        else:
            states += value[:, None] * BLOCK_K + key[None, :]
        written += before * (CHUNK * V_PADDED) + i[:, None] * V_PADDED + value[None, :]
    of_key = i[:, None] * BLOCK_K + key[None, :]
    of_reader = row_of_both(i)[:, None] * BLOCK_K + key[None, :]
    of_solved = row_of_both(i)[:, None] * CHUNK + i[None, :]
    is_solved = i[:, None] >= i[None, :] // 16 * 16
    row_of_all = tl.arange(0, 2 * CHUNK)
    of_all = row_of_all // 16 * 8 + row_of_all % 8  # tokens
    end = begin + count
    for number in range(chunks):
        t = begin + number * CHUNK + i
        is_token = (t < end)[:, None]
        keys = tl.load(keyed + 2 * CHUNK * BLOCK_K + of_key, is_token, other=0.0)
        values = tl.load(tile_ptrs(v, t, v_stride, value, ALIGNED), is_token & in_value, other=0.0)
        decay = tl.load(whole + key)
        known = s.to(operand)
        if JOINED:
            if output is not None:
                is_reader = (of_all < count - number * CHUNK)[:, None]
                readers = tl.load(keyed + row_of_all[:, None] * BLOCK_K + key[None, :], is_reader, other=0.0)
                is_there = of_all[:, None] >= i[None, :] // 16 * 16
                both = tl.load(solved + row_of_all[:, None] * CHUNK + i[None, :], is_there, other=0.0)
                found, y = halves(tl.dot(readers, known, input_precision=PRECISION))
                lacking = (values.to(tl.float32) - found).to(operand)
                new, read = halves(tl.dot(both, lacking, input_precision=PRECISION))
                y += read
            else:
                through = tl.load(keyed + of_reader, is_token, other=0.0)
                inverse = tl.load(solved + of_solved, is_solved, other=0.0)
                lacking = values.to(tl.float32) - tl.dot(through, known, input_precision=PRECISION)
                new = tl.dot(inverse, lacking.to(operand), input_precision=PRECISION)
            new = new.to(operand)
            s = tl.dot(tl.trans(keys), new, s * decay[:, None], input_precision=PRECISION)
        else:
            through = tl.load(keyed + of_reader, is_token, other=0.0)
            if output is not None:
                queries = tl.load(keyed + 8 * BLOCK_K + of_reader, is_token, other=0.0)
                y = tl.dot(known, tl.trans(queries), input_precision=PRECISION)
            lacking = tl.trans(values).to(tl.float32)
            lacking = (lacking - tl.dot(known, tl.trans(through), input_precision=PRECISION)).to(operand)
            if output is not None:
                weight = tl.load(solved + 8 * CHUNK + of_solved, is_solved, other=0.0)
                y = tl.trans(tl.dot(lacking, tl.trans(weight), y, input_precision=PRECISION))
            inverse = tl.load(solved + of_solved, is_solved, other=0.0)
            turned = tl.dot(lacking, tl.trans(inverse), input_precision=PRECISION).to(operand)
            s = tl.dot(turned, keys, s * decay[None, :], input_precision=PRECISION)
            new = tl.trans(turned)
        if output is not None:
            tl.store(tile_ptrs(output, t, output_stride, value, ALIGNED), y, is_token & in_value)
        if states is not None:
            tl.store(states, known)
            tl.store(written, new)
            states += V_HEADS * V_PADDED * BLOCK_K
            written += V_HEADS * CHUNK * V_PADDED
        keyed += V_HEADS * 4 * CHUNK * BLOCK_K
        whole += V_HEADS * BLOCK_K
        solved += V_HEADS * 2 * CHUNK * CHUNK

    if output is not None:
        target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
        stored &= slot_stride >= 0
        tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)
