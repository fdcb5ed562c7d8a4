"""The Mamba-2 recurrence over whole sequences, chunk by chunk, in three launches.

`_prepare` finds every chunk's tokens and what of their past each of them keeps. `_states` walks over the chunks of a
row, with a tile of one head's state in registers. `_outputs` then has all chunks at once: what a token reads of the
state before its chunk, and of the tokens of its chunk.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import (
    INTERPRETED,
    advanced,
    cdiv,
    is_set,
    last_slot,
    on_device_of,
    optional,
    slot_of,
    softplus,
    tile,
)
from mamba_ops.ops._triton.launch_config import Launches, by_table
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back

if TYPE_CHECKING:
    from mamba_ops.ops.mamba_chunk_scan.op import Arguments

# What varies from call to call: Triton would compile anew for some values. The launcher's ALIGNED says what is needed.
_NUMBERS = """length rows tokens null_slot slots_stride write_stride initial_stride computed_stride x_stride dt_stride
    B_stride C_stride z_stride output_stride slot_stride head_stride dim_stride dstate_stride kept_stride
    dt_min dt_max""".split()
_POINTERS = """x dt A B C D z dt_bias cu_seqlens num_computed_tokens ssm_state slots write_slots has_initial_state
    chunk_states output""".split()


@triton.jit
def _extent(row, inside, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK: tl.constexpr):
    # a row's first token, how many it has, and how much of its first chunk came before them
    if cu_seqlens is not None:
        begin = tl.load(cu_seqlens + row, inside, other=0).to(tl.int32)
        count = tl.load(cu_seqlens + row + 1, inside, other=0).to(tl.int32) - begin
    else:
        begin = row * length
        count = tl.where(inside, length, 0)
    num_computed_tokens += row.to(tl.int64) * computed_stride
    before = tl.load(num_computed_tokens, inside & (computed_stride >= 0), other=0) % CHUNK
    return begin, count, before.to(tl.int32)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _prepare(
    dt,
    A,
    dt_bias,
    cu_seqlens,
    num_computed_tokens,
    slots,
    has_initial_state,
    steps,  # out: (3, heads, tokens): log2 of the decay since the chunk began, dt, and dt decayed to the chunk's end
    chunks,  # out: (chunks, 3): the first token, the one after the last, and the chunk's past: see below
    first_chunks,  # out: (rows,)
    dt_stride,
    slots_stride,
    initial_stride,
    computed_stride,
    length,  # tokens of every row; None: cu_seqlens
    rows,
    tokens,
    null_slot,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    # The rows whose chunks all come before this one are counted: as many are before the chunk's row.
    chunk = tl.program_id(0)
    row = 0
    first = 0
    total = 0
    for start in range(0, rows, BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        begin, count, before = _extent(r, r < rows, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
        of_row = tl.where(count > 0, (before + count + CHUNK - 1) // CHUNK, 0)
        end = total + tl.cumsum(of_row, 0)
        earlier = (r < rows) & (end <= chunk)
        row += tl.sum(earlier.to(tl.int32), 0)
        first = tl.maximum(first, tl.max(tl.where(earlier, end, 0), 0))
        total += tl.sum(of_row, 0)

    chunks += chunk * 3
    if row >= rows:  # there can be fewer chunks than programs
        tl.store(chunks, 0)
        tl.store(chunks + 1, 0)
        return
    begin, count, before = _extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    low = begin + tl.maximum((chunk - first) * CHUNK - before, 0)
    high = begin + tl.minimum((chunk - first + 1) * CHUNK - before, count)

    # 1: a state comes before the chunk; 0: none does, it is zero; -1: the row is nobody's
    past = (chunk > first).to(tl.int32)
    past |= is_set(row, has_initial_state, initial_stride).to(tl.int32)
    past = tl.where(slot_of(row, slots, slots_stride, null_slot) < 0, -1, past)
    if tl.program_id(1) == 0:
        tl.store(chunks, low)
        tl.store(chunks + 1, high)
        tl.store(chunks + 2, past)
        if chunk == first:
            tl.store(first_chunks + row, chunk)
    if past < 0:
        return

    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    token = low + tl.arange(0, BLOCK_TOKENS)
    inside = (token < high)[:, None] & (head < HEADS)[None, :]
    d = tl.load(tile(dt, token, dt_stride, head, False), inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        d += tl.load(dt_bias + head, head < HEADS, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        d = softplus(d)
    d = tl.where(inside, tl.minimum(tl.maximum(d, dt_min), dt_max), 0.0)
    rate = tl.load(A + head, head < HEADS, other=0.0).to(tl.float32) * 1.4426950408889634
    log_decay = d * rate[None, :]

    steps += head.to(tl.int64)[None, :] * tokens + token[:, None]
    plane = HEADS * tokens.to(tl.int64)
    tl.store(steps, tl.cumsum(log_decay, 0), inside)
    tl.store(steps + plane, d, inside)
    # summed from the end, so that what decays little is exact
    tl.store(steps + 2 * plane, tl.exp2(tl.cumsum(log_decay, 0, reverse=True) - log_decay) * d, inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _states(
    x,
    B,
    cu_seqlens,
    num_computed_tokens,
    slots,
    write_slots,
    has_initial_state,
    ssm_state,
    chunk_states,
    steps,
    first_chunks,
    befores,  # out: (chunks, heads, dim, dstate), the state before a chunk, for those that have a past
    x_stride,  # this and the next: from token to token
    B_stride,
    slots_stride,
    write_stride,
    initial_stride,
    computed_stride,
    slot_stride,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    dim_stride,
    dstate_stride,
    kept_stride,  # from chunk to chunk of chunk_states
    length,
    tokens,
    null_slot,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # Programs that run together read the same tokens: rows are outermost, then heads.
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    BLOCKS: tl.constexpr = DIM_BLOCKS * ((DSTATE + BLOCK_STATE - 1) // BLOCK_STATE)
    PER_CHUNK: tl.constexpr = (CHUNK + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    program = tl.program_id(0)
    row = program // (BLOCKS * HEADS)
    head = program // BLOCKS % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = program % BLOCKS // DIM_BLOCKS * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    in_state = in_dim[:, None] & in_dstate[None, :]

    source = slot_of(row, slots, slots_stride, null_slot)
    if source < 0:
        return
    begin, count, before = _extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)

    if ALIGNED:
        of_state = (head * DIM + channel)[:, None] * DSTATE + entry[None, :]
    else:
        of_state = channel.to(tl.int64)[:, None] * dim_stride + entry.to(tl.int64)[None, :] * dstate_stride
        of_state += head.to(tl.int64) * head_stride
    carried = is_set(row, has_initial_state, initial_stride)
    given = advanced(ssm_state, source * slot_stride, ALIGNED) + of_state
    s = tl.load(given, in_state & carried, other=0.0).to(tl.float32)

    if count > 0:
        chunk = tl.load(first_chunks + row).to(tl.int64)
        in_head = channel[:, None] * DSTATE + entry[None, :]
        befores += (chunk * HEADS + head) * (DIM * DSTATE)
        if chunk_states is not None:
            chunk_states += chunk * kept_stride + head * (DIM * DSTATE)
        x += head * DIM
        B += head // (HEADS // GROUPS) * DSTATE
        decay = steps + head.to(tl.int64) * tokens + begin
        weight = decay + 2 * HEADS * tokens.to(tl.int64)

        last = (before + count - 1) // CHUNK
        blocks = last * PER_CHUNK + (before + count - last * CHUNK + BLOCK_TOKENS - 1) // BLOCK_TOKENS
        for block in range(blocks):
            number = block // PER_CHUNK
            low = number * CHUNK - before
            high = tl.minimum(low + CHUNK, count)
            if block % PER_CHUNK == 0:
                if carried | (number > 0):
                    tl.store(befores + number.to(tl.int64) * (HEADS * DIM * DSTATE) + in_head, s, in_state)
                if chunk_states is not None:
                    if number > 0:
                        tl.store(chunk_states + (number - 1).to(tl.int64) * kept_stride + in_head, s, in_state)
                s *= tl.exp2(tl.load(decay + high - 1))
            t = low + block % PER_CHUNK * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            inside = (t >= 0) & (t < high)
            u = tl.load(tile(x, begin + t, x_stride, channel, ALIGNED), inside[:, None] & in_dim[None, :], other=0.0)
            b = tl.load(tile(B, begin + t, B_stride, entry, ALIGNED), inside[:, None] & in_dstate[None, :], other=0.0)
            w = tl.load(weight + t, inside, other=0.0)
            b = b.to(tl.float32) * w[:, None]
            operand = befores.dtype.element_ty
            s = tl.dot(tl.trans(u.to(operand)), b.to(operand), s, input_precision="ieee")
        if chunk_states is not None:
            tl.store(chunk_states + last.to(tl.int64) * kept_stride + in_head, s, in_state)

    target, stored = last_slot(row, source, count, write_slots, write_stride, null_slot)
    stored &= slot_stride >= 0
    tl.store(advanced(ssm_state, target * slot_stride, ALIGNED) + of_state, s, in_state & stored)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _outputs(
    x,
    B,
    C,
    D,
    z,
    output,
    steps,
    chunks,
    befores,
    x_stride,  # this and the next four: from token to token
    B_stride,
    C_stride,
    z_stride,
    output_stride,
    tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,  # of output
    BLOCK_PAST: tl.constexpr,  # of the tokens that they read
):
    # Programs that run together read the same chunk; those with the most to read come first.
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    BLOCKS: tl.constexpr = (CHUNK + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    program = tl.program_id(0)
    chunk = (program // (BLOCKS * DIM_BLOCKS * HEADS)).to(tl.int64)
    head = program // (BLOCKS * DIM_BLOCKS) % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE

    begin = tl.load(chunks + chunk * 3)
    end = tl.load(chunks + chunk * 3 + 1)
    first = begin + (BLOCKS - 1 - program // DIM_BLOCKS % BLOCKS) * BLOCK_TOKENS
    if first >= end:
        return
    past = tl.load(chunks + chunk * 3 + 2)
    token = first + tl.arange(0, BLOCK_TOKENS)
    inside = token < end
    written = inside[:, None] & in_dim[None, :]
    output = tile(output + head * DIM, token, output_stride, channel, ALIGNED)
    if past < 0:
        tl.store(output, tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32), written)
        return

    operand = befores.dtype.element_ty
    x += head * DIM
    B += head // (HEADS // GROUPS) * DSTATE
    C += head // (HEADS // GROUPS) * DSTATE
    decays = steps + head.to(tl.int64) * tokens
    sizes = decays + HEADS * tokens.to(tl.int64)
    decay = tl.load(decays + token, inside, other=float("-inf"))
    c = tl.load(tile(C, token, C_stride, entry, ALIGNED), inside[:, None] & in_dstate[None, :], other=0.0).to(operand)

    y = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    if past > 0:
        befores += (chunk * HEADS + head) * (DIM * DSTATE)
        s = tl.load(tile(befores, channel, DSTATE, entry, ALIGNED), in_dim[:, None] & in_dstate[None, :], other=0.0)
        y = tl.dot(c, tl.trans(s), input_precision="ieee") * tl.exp2(decay)[:, None]
    for start in range(begin, tl.minimum(first + BLOCK_TOKENS, end), BLOCK_PAST):
        t = start + tl.arange(0, BLOCK_PAST)
        there = t < end
        b = tl.load(tile(B, t, B_stride, entry, ALIGNED), there[:, None] & in_dstate[None, :], other=0.0).to(operand)
        u = tl.load(tile(x, t, x_stride, channel, ALIGNED), there[:, None] & in_dim[None, :], other=0.0).to(operand)
        w = decay[:, None] - tl.load(decays + t, there, other=0.0)[None, :]
        w = tl.exp2(tl.where(token[:, None] >= t[None, :], w, float("-inf")))
        w *= tl.load(sizes + t, there, other=0.0)[None, :]
        w *= tl.dot(c, tl.trans(b), input_precision="ieee")
        y = tl.dot(w.to(operand), u, y, input_precision="ieee")

    if D is not None:
        u = tl.load(tile(x, token, x_stride, channel, ALIGNED), written, other=0.0).to(tl.float32)
        if D_PER_CHANNEL:
            y += u * tl.load(D + head * DIM + channel, in_dim, other=0.0).to(tl.float32)[None, :]
        else:
            y += u * tl.load(D + head).to(tl.float32)
    if z is not None:
        gate = tl.load(tile(z + head * DIM, token, z_stride, channel, ALIGNED), written, other=0.0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(output, y, written)


def mamba_chunk_scan(call: "Arguments") -> None:
    """Write `output`, and the states in place; shapes and meaning are the op's, and are not checked again.

    Matrix products are of the common dtype of x, B and C, and sum in float32. Every token of an activation must be
    dense, and every parameter: others are copied first, and an output or chunk_states that is not is written through a
    copy. Where a token of x, B, C, z or output or a slot of ssm_state does not start at a multiple of 16 bytes, or a
    slot is not dense, reads are narrow and slow.
    """
    x = call.x
    dt = call.dt
    A = call.A
    B = call.B
    C = call.C
    D = call.D
    z = call.z
    dt_bias = call.dt_bias
    cu_seqlens = call.cu_seqlens
    num_computed_tokens = call.num_computed_tokens
    ssm_state = call.ssm_state
    slots = call.slots
    has_initial_state = call.has_initial_state
    flat = cu_seqlens is not None
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if rows == 0:
        return
    heads, dim, groups, dstate = *x.shape[-2:], *B.shape[-2:]
    length = None if flat else x.shape[1]
    written = by_token(call.output, flat)
    x, dt, B, C = by_token(x, flat), by_token(dt, flat), by_token(B, flat), by_token(C, flat)
    z = None if z is None else by_token(z, flat)
    kept = None if call.chunk_states is None else dense(call.chunk_states)
    A = A.contiguous()
    D, dt_bias, cu_seqlens = (None if t is None else t.contiguous() for t in (D, dt_bias, cu_seqlens))

    tokens = x.shape[0]
    chunks = tokens // call.chunk_size + (rows if num_computed_tokens is None else 2 * rows)  # at most
    operand = torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)
    if operand == torch.float64 or (operand == torch.bfloat16 and INTERPRETED):
        operand = torch.float32  # Triton's interpreter multiplies the bits of bfloat16 numbers
    steps = x.new_empty(3, heads, tokens, dtype=torch.float32)
    table = x.new_empty(chunks, 3, dtype=torch.int32)
    first_chunks = x.new_empty(rows, dtype=torch.int32)
    befores = x.new_empty(chunks, heads, dim, dstate, dtype=operand)
    aligned = all(
        t is None or (t.data_ptr() | t.stride(0) * t.itemsize | t.shape[-1] * t.itemsize) % 16 == 0
        for t in (x, B, C, z, written)
    )
    slot_stride, *strides = (-1, 0, 0, 0) if ssm_state is None else ssm_state.stride()
    if ssm_state is not None:
        aligned &= (ssm_state.data_ptr() | slot_stride * ssm_state.itemsize) % 16 == 0 and is_dense(ssm_state)
    head_stride, dim_stride, dstate_stride = (None, None, None) if aligned else strides
    slots, slots_stride = optional(slots, x, tl.int32)
    has_initial_state, initial_stride = optional(None if ssm_state is None else has_initial_state, x, tl.int1)
    ssm_state, _ = optional(ssm_state, x, tl.float32)
    num_computed_tokens, computed_stride = optional(num_computed_tokens, x, tl.int32)
    shape = {
        "HEADS": heads,
        "DIM": dim,
        "GROUPS": groups,
        "DSTATE": dstate,
        "CHUNK": call.chunk_size,
        "ALIGNED": aligned,
    }
    launches = _launches(x.get_device(), dim, dstate, call.chunk_size, operand.itemsize)
    prepare, states, outputs = (launches[kernel] for kernel in ("_prepare", "_states", "_outputs"))
    with on_device_of(x):
        _prepare[(chunks, cdiv(heads, prepare["BLOCK_HEADS"]))](
            dt,
            A,
            dt_bias,
            cu_seqlens,
            num_computed_tokens,
            slots,
            has_initial_state,
            steps,
            table,
            first_chunks,
            dt.stride(0),
            slots_stride,
            initial_stride,
            computed_stride,
            length,
            rows,
            tokens,
            call.null_slot,
            call.dt_min,
            call.dt_max,
            HEADS=heads,
            CHUNK=call.chunk_size,
            SOFTPLUS=call.dt_softplus,
            **prepare,
        )
        _states[(rows * heads * cdiv(dim, states["BLOCK_DIM"]) * cdiv(dstate, states["BLOCK_STATE"]),)](
            x,
            B,
            cu_seqlens,
            num_computed_tokens,
            slots,
            call.write_slots,
            has_initial_state,
            ssm_state,
            kept,
            steps,
            first_chunks,
            befores,
            x.stride(0),
            B.stride(0),
            slots_stride,
            None if call.write_slots is None else call.write_slots.stride(0),
            initial_stride,
            computed_stride,
            slot_stride,
            head_stride,
            dim_stride,
            dstate_stride,
            None if kept is None else kept.stride(0),
            length,
            tokens,
            call.null_slot,
            **shape,
            **states,
        )
        if tokens > 0:
            blocks = cdiv(call.chunk_size, outputs["BLOCK_TOKENS"]) * cdiv(dim, outputs["BLOCK_DIM"])
            _outputs[(chunks * heads * blocks,)](
                x,
                B,
                C,
                D,
                z,
                written,
                steps,
                table,
                befores,
                x.stride(0),
                B.stride(0),
                C.stride(0),
                None if z is None else z.stride(0),
                written.stride(0),
                tokens,
                D_PER_CHANNEL=D is not None and D.dim() == 2,
                **shape,
                **outputs,
            )
    write_back(written, call.output, flat)
    if call.chunk_states is not None and kept is not None and kept.data_ptr() != call.chunk_states.data_ptr():
        call.chunk_states.copy_(kept)


@by_table(
    _prepare="BLOCK_HEADS num_warps",
    _states="BLOCK_DIM BLOCK_STATE BLOCK_TOKENS num_warps num_stages",
    _outputs="BLOCK_DIM BLOCK_TOKENS BLOCK_PAST num_warps num_stages",
)
def _launches(dim: int, dstate: int, chunk_size: int, itemsize: int) -> Launches:
    """No side of a matrix product is shorter than 16."""
    dim, dstate, chunk = (max(triton.next_power_of_2(size), 16) for size in (dim, dstate, chunk_size))
    wide = 64 if itemsize < 4 else 32  # float32 goes without matrix units
    prepare = {"BLOCK_ROWS": 128, "BLOCK_TOKENS": chunk, "BLOCK_HEADS": max(2048 // chunk, 1), "num_warps": 4}
    states = {
        "BLOCK_DIM": min(dim, wide),
        "BLOCK_STATE": min(dstate, wide),
        "BLOCK_TOKENS": min(chunk, wide),
        "num_warps": 4,
        "num_stages": 3,
    }
    outputs = {
        "BLOCK_DIM": min(dim, wide),
        "BLOCK_STATE": dstate,
        "BLOCK_TOKENS": min(chunk, wide),
        "BLOCK_PAST": min(chunk, 32),
        "num_warps": 4,
        "num_stages": 2,
    }
    return {"_prepare": prepare, "_states": states, "_outputs": outputs}
