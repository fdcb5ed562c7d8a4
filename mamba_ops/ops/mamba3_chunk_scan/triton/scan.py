"""The last of the five launches of Mamba-3's scan: `_scan` walks over the chunks that `chunks.py` has prepared."""

import triton.language as tl

from mamba_ops.ops._triton.common import (
    final_slot,
    kernel,
    load_flag,
    load_slot,
    offset_ptr,
    row_chunks,
    tile_ptrs,
    to_be_multiplied,
)
from mamba_ops.ops._triton.mamba3 import gated


@kernel(first_number="x_stride", static="D keys queries factors weights before last_angle last_k")
def _scan(
    x,
    D,
    z,
    cu_seqlens,
    angle_state,
    ssm_state,
    k_state,
    v_state,
    slots,
    write_slots,
    has_initial_state,
    output,
    keys,
    queries,
    factors,
    weights,
    before,
    last_angle,
    last_k,
    x_stride,  # this and the next two: from token to token
    z_stride,
    output_stride,
    slots_stride,
    write_stride,
    initial_stride,
    angle_stride,  # this and the next three: from slot to slot
    slot_stride,
    k_stride,
    v_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
    angle_head_stride,
    angle_pair_stride,
    k_head_stride,
    k_entry_stride,
    v_head_stride,
    v_entry_stride,
    length,
    null_slot,
    slot_count,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    ANGLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * HEADS)
    head = program // BLOCKS % HEADS
    value = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, 2 * HALF)
    i = tl.arange(0, CHUNK)
    in_dim = value < DIM
    in_dstate = entry < DSTATE
    in_value = in_dim[None, :]
    in_state = in_dim[:, None] & in_dstate[None, :]

    output += head * DIM
    rows = tl.num_programs(0) // (BLOCKS * HEADS)
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    if source < 0:
        for number in range(chunks):
            t = begin + number * CHUNK + i
            place = tile_ptrs(output, t, output_stride, value, ALIGNED)
            tl.store(place, tl.zeros([CHUNK, BLOCK], tl.float32), (t < begin + count)[:, None] & in_value)
        return
    of_head = head.to(tl.int64)
    of_v = of_head * v_head_stride + value.to(tl.int64) * v_entry_stride
    if ALIGNED:
        of_state = (head * DIM + value)[:, None] * DSTATE + entry[None, :]
    else:
        of_state = value.to(tl.int64)[:, None] * dim_stride + entry.to(tl.int64)[None, :] * dstate_stride
        of_state += of_head * head_stride
    goes_on = load_flag(row, has_initial_state, initial_stride)
    carried = in_state & goes_on
    s = tl.load(offset_ptr(ssm_state, source * slot_stride, ALIGNED) + of_state, carried, other=0.0).to(tl.float32)
    last_v = tl.load(v_state + source * v_stride + of_v, in_dim & goes_on, other=0.0).to(tl.float32)

    operand = keys.dtype.element_ty
    x += head * DIM
    of_chunk = first.to(tl.int64) * HEADS + head
    factors += of_chunk * (4 * CHUNK)
    keys += of_chunk * (CHUNK * DSTATE)
    queries += of_chunk * (CHUNK * DSTATE)
    weights += of_chunk * (CHUNK * CHUNK)
    of_row = row.to(tl.int64) * HEADS + head
    late = tl.load(factors + 3 * CHUNK, count > 0, other=0.0)
    k_before = tl.load(before + of_row * DSTATE + entry, in_dstate & goes_on & (count > 0), other=0.0).to(tl.float32)
    s += (last_v * late)[:, None] * k_before[None, :]
    square = i[:, None] * CHUNK + i[None, :]
    of_key = i[:, None] * DSTATE + entry[None, :]
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    for number in range(chunks):
        t = begin + number * CHUNK + i
        there = (t < begin + count)[:, None]
        k = tl.load(keys + of_key, there & in_dstate[None, :], other=0.0)
        q = tl.load(queries + of_key, there & in_dstate[None, :], other=0.0)
        values = tl.load(tile_ptrs(x, t, x_stride, value, ALIGNED), there & in_value, other=0.0)
        weight = tl.load(weights + square)
        of_query = tl.load(factors + i)
        decay = tl.load(factors + 2 * CHUNK)

        new = tl.trans(values).to(tl.float32)
        known = to_be_multiplied(s, PRECISION).to(operand)
        y = tl.dot(known, tl.trans(q), input_precision=PRECISION) * of_query[None, :]
        kept = to_be_multiplied(new * tl.load(factors + CHUNK + i)[None, :], PRECISION).to(operand)
        s = tl.dot(kept, k, s * decay, input_precision=PRECISION)
        y = tl.dot(new.to(operand), tl.trans(weight), y, input_precision=PRECISION)
        y = tl.trans(y)
        if D is not None:
            y += values.to(tl.float32) * skip
        if z is not None:
            gates = tl.load(tile_ptrs(z + head * DIM, t, z_stride, value, ALIGNED), there & in_value, other=0.0)
            y = gated(y, gates.to(tl.float32))
        tl.store(tile_ptrs(output, t, output_stride, value, ALIGNED), y, there & in_value)
        factors += HEADS * 4 * CHUNK
        keys += HEADS * CHUNK * DSTATE
        queries += HEADS * CHUNK * DSTATE
        weights += HEADS * CHUNK * CHUNK

    target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
    if stored & (slot_stride >= 0):
        pair = tl.arange(0, HALF)
        is_angle = pair < ANGLES
        of_angle = of_head * angle_head_stride + pair.to(tl.int64) * angle_pair_stride
        of_k = of_head * k_head_stride + entry.to(tl.int64) * k_entry_stride
        if count > 0:
            last = (begin + count - 1).to(tl.int64)
            last_v = tl.load(x + last * x_stride + value, in_dim, other=0.0).to(tl.float32)
            angle = tl.load(last_angle + of_row * ANGLES + pair, is_angle, other=0.0)
            k_now = tl.load(last_k + of_row * DSTATE + entry, in_dstate, other=0.0)
        else:
            angle = tl.load(angle_state + source * angle_stride + of_angle, is_angle & goes_on, other=0.0)
            angle = angle.to(tl.float32)
            k_now = tl.load(k_state + source * k_stride + of_k, in_dstate & goes_on, other=0.0).to(tl.float32)
        is_first = program % BLOCKS == 0  # of the programs of a head
        tl.store(offset_ptr(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state)
        tl.store(v_state + target * v_stride + of_v, last_v, in_dim)
        tl.store(k_state + target * k_stride + of_k, k_now, in_dstate & is_first)
        tl.store(angle_state + target * angle_stride + of_angle, angle, is_angle & is_first)
