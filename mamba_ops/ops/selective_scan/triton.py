"""The Mamba-1 recurrence over whole sequences, in chunks of tokens that run side by side: three launches, or one.

`_ends` finds what every chunk but a row's last would leave if nothing came before it. `_starts` walks over the chunks
of a row and turns that into the state before each of them. `_outputs` then runs every chunk from its state. Rows of one
chunk need the last one alone, and give the same bits either way.

A thread has a channel with all its state in registers, and threads exchange nothing: a state is not one tensor, which
Triton would spread over threads as it sees fit, but a tuple of up to 16, each with one number of every channel. Larger
states have several such numbers (parts) in each tensor of the tuple.
"""

from typing import TYPE_CHECKING

# mypy: disable-error-code="assignment"
# Tuples grow in what Triton compiles.
import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.common import (
    INTERPRETED,
    cdiv,
    chunk_at,
    chunks_of,
    is_set,
    on_device_of,
    optional,
    slot_of,
    softplus,
)
from mamba_ops.ops._triton.launch_config import Launches, by_table
from mamba_ops.ops._triton.layout import by_token, dense, is_dense, write_back

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.op import Arguments

CHUNK = 64  # tokens, counted from a row's first one
MORE_VARIANTS = {  # than two of a kernel that random calls of one form may compile: how many, and why
    "_outputs": (4, "B and C in words of four numbers or not; states that are dense within a slot or not"),
}

# What varies from call to call: Triton would compile anew for some values.
_NUMBERS = """rows length null_slot one A_channel A_entry slots_stride write_stride initial_stride slot_stride
    dim_stride dstate_stride block_size
    x_token dt_token z_token output_token B_token C_token""".split()
_POINTERS = """x dt A B C D z dt_bias output ssm_state slots write_slots has_initial_state cu_seqlens
    first_block last_block initial_block chunk_ends last_chunk""".split()


@triton.jit
def _chunk(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    # a chunk's row (rows if there is no such chunk), its tokens from low to high, and whether it is the row's first
    # and last one
    if chunk_ends is not None:
        row = 0
        first = 0
        for start in range(0, rows, BLOCK_ROWS):
            r = start + tl.arange(0, BLOCK_ROWS)
            last = tl.load(last_chunk + r, r < rows, other=0).to(tl.int32)
            earlier = (r < rows) & (last < chunk)
            row += tl.sum(earlier.to(tl.int32), 0)
            first = tl.maximum(first, tl.max(tl.where(earlier, last + 1, 0), 0))
        low = tl.load(chunk_ends + chunk - 1, chunk > 0, other=0).to(tl.int32)
        high = tl.load(chunk_ends + chunk).to(tl.int32)
        is_last = chunk == tl.load(last_chunk + row, row < rows, other=0).to(tl.int32)
        return row, low, high, chunk == first, is_last
    else:
        return chunk_at(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)


@triton.jit
def _source(row, slots, initial_block, slots_stride, null_slot):
    # where a row's state is, -1 for nobody
    if initial_block is not None:
        slots += tl.load(initial_block + row)
    return slot_of(row, slots, slots_stride, null_slot)


@triton.jit
def _entries(tensor, DSTATE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    # B or C of a token as it lies there: WIDTH times PARTS numbers, or words of four
    part = tl.arange(0, PARTS)
    found = ()
    if WORDS:
        tensor = tensor.to(tl.pointer_type(tl.int64), bitcast=True)
        for word in tl.static_range(WIDTH // 4):
            found += (tl.load(tensor + part * (WIDTH // 4) + word, part * WIDTH + word * 4 < DSTATE, other=0),)
    else:
        for number in tl.static_range(WIDTH):
            entry = part * WIDTH + number
            found += (tl.load(tensor + entry, entry < DSTATE, other=0.0),)
    return found


@triton.jit
def _numbers(found, dtype: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    # the same in float32
    numbers = ()
    if WORDS:
        for word in tl.static_range(WIDTH // 4):
            for half in tl.static_range(2):
                pair = (found[word] >> (32 * half)).to(tl.int32)
                if dtype == tl.bfloat16:
                    low = (pair << 16).to(tl.float32, bitcast=True)
                    high = (pair & -65536).to(tl.float32, bitcast=True)
                else:
                    low = pair.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
                numbers += (low, high)
    else:
        for number in tl.static_range(WIDTH):
            numbers += (found[number].to(tl.float32),)
    return numbers


@triton.jit
def _of_state(
    pointer,
    channel,
    channel_stride,
    in_dim,
    entry_stride,
    DSTATE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # the numbers of some channels' states, in float32
    found = ()
    for number in tl.static_range(WIDTH):
        entry = tl.arange(0, PARTS)[:, None] * WIDTH + number
        place = pointer + channel[None, :] * channel_stride + entry * entry_stride
        found += (tl.load(place, (entry < DSTATE) & in_dim[None, :], other=0.0).to(tl.float32),)
    return found


@triton.jit
def _store_state(
    pointer,
    values,
    channel,
    channel_stride,
    in_dim,
    entry_stride,
    DSTATE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    for number in tl.static_range(WIDTH):
        entry = tl.arange(0, PARTS)[:, None] * WIDTH + number
        place = pointer + channel[None, :] * channel_stride + entry * entry_stride
        tl.store(place, values[number], (entry < DSTATE) & in_dim[None, :])


@triton.jit
def _after(s, step, pushed, rates, into, WIDTH: tl.constexpr):
    # the states after a token
    after = ()
    for number in tl.static_range(WIDTH):
        after += (s[number] * tl.exp2(rates[number] * step[None, :]) + pushed[None, :] * into[number][:, None],)
    return after


@triton.jit
def _rates(A, channel, A_channel, in_dim, A_entry, DSTATE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    rates = ()
    found = _of_state(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
    for number in tl.static_range(WIDTH):
        rates += (found[number] * 1.4426950408889634,)
    return rates


@triton.jit
def _step_size(d, bias, SOFTPLUS: tl.constexpr):
    if bias is not None:
        d += bias
    if SOFTPLUS:
        d = softplus(d)
    return d


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _ends(
    x,
    dt,
    A,
    B,
    dt_bias,
    slots,
    cu_seqlens,
    initial_block,
    chunk_ends,
    last_chunk,
    states,  # out: (chunks, dstate, dim)
    sums,  # out: (chunks, dim), of the step sizes
    rows,
    length,
    null_slot,
    one,
    A_channel,
    A_entry,
    slots_stride,
    x_token,
    dt_token,
    B_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    chunk = program // (BLOCKS * GROUPS)
    group = program // BLOCKS % GROUPS
    in_group = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    in_dim = in_group < OF_GROUP
    channel = group * OF_GROUP + in_group

    row, low, high, _, is_last = _chunk(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS)
    if (row >= rows) | is_last:
        return
    if _source(row, slots, initial_block, slots_stride, null_slot) < 0:
        return
    rates = _rates(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)

    x += low.to(tl.int64) * x_token + channel
    dt += low.to(tl.int64) * dt_token + channel
    B += low.to(tl.int64) * B_token + group * DSTATE
    s = ()
    for _ in tl.static_range(WIDTH):
        s += (tl.zeros([PARTS, BLOCK], tl.float32),)
    total = tl.zeros([BLOCK], tl.float32)
    some = low < high
    value = tl.load(x, in_dim & some, other=0.0)
    d = tl.load(dt, in_dim & some, other=0.0)
    for t in range(low, high):
        # Taken out of where the next token's go before those are asked for: a register then waits for neither.
        rhs = value.to(tl.float32)
        step = d.to(tl.float32)
        more = (t + 1 < high).to(tl.int32)
        x += more * x_token
        dt += more * dt_token
        value = tl.load(x, in_dim, other=0.0)
        d = tl.load(dt, in_dim, other=0.0)
        b = _entries(B, DSTATE, PARTS, WIDTH, WORDS)
        B += B_token
        step = _step_size(step, bias, SOFTPLUS)
        s = _after(s, step, step * rhs, rates, _numbers(b, B.dtype.element_ty, WIDTH, WORDS), WIDTH)
        total += step
    states += chunk.to(tl.int64) * (DSTATE * DIM)
    _store_state(states, s, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)
    tl.store(sums + chunk.to(tl.int64) * DIM + channel * one, total, in_dim)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _starts(
    A,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    cu_seqlens,
    first_block,
    initial_block,
    chunk_ends,
    last_chunk,
    states,  # in: what chunks leave; out: what they begin with
    sums,
    length,
    null_slot,
    A_channel,
    A_entry,
    slots_stride,
    write_stride,
    initial_stride,
    slot_stride,
    dim_stride,
    dstate_stride,
    block_size,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // (BLOCKS * DSTATE)
    channel = program // DSTATE % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    entry = program % DSTATE
    in_dim = channel < DIM

    source = _source(row, slots, initial_block, slots_stride, null_slot)
    if source < 0:
        return
    if chunk_ends is not None:
        first = tl.load(last_chunk + row - 1, row > 0, other=-1).to(tl.int32) + 1
        chunks = tl.load(last_chunk + row).to(tl.int32) + 1 - first
        low = tl.load(chunk_ends + first - 1, first > 0, other=0).to(tl.int32)
        count = chunks
    else:
        first, chunks, low, count = chunks_of(row, cu_seqlens, length, CHUNK, BLOCK_ROWS)

    of_state = channel.to(tl.int64) * dim_stride + entry.to(tl.int64) * dstate_stride
    carried = in_dim & is_set(row, has_initial_state, initial_stride)
    s = tl.load(ssm_state + source * slot_stride + of_state, carried, other=0.0).to(tl.float32)

    if write_slots is not None:
        if count <= 0:  # no token, no chunk: the state moves as it is
            target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = (target != source) & (target >= 0) & (target != null_slot)
            tl.store(ssm_state + target * slot_stride + of_state, s, in_dim & stored)

    if states is not None:
        if chunks > 1:
            position = low
            if chunk_ends is not None:
                high = tl.load(chunk_ends + first).to(tl.int32)
                position = tl.load(first_block + row).to(tl.int32) * block_size
                position += tl.maximum(block_size - (high - low), 0)
            rate = tl.load(A + channel * A_channel + entry * A_entry, in_dim, other=0.0).to(tl.float32)
            rate *= 1.4426950408889634
            place = states + first.to(tl.int64) * (DSTATE * DIM) + entry * DIM + channel
            of_chunk = sums + first.to(tl.int64) * DIM + channel
            left = tl.load(place, in_dim, other=0.0)
            total = tl.load(of_chunk, in_dim, other=0.0)
            for number in range(chunks - 1):
                there = number + 2 < chunks
                next_left = tl.load(place + DSTATE * DIM, in_dim & there, other=0.0)
                next_total = tl.load(of_chunk + DIM, in_dim & there, other=0.0)
                tl.store(place, s, in_dim)
                s = s * tl.exp2(rate * total) + left
                if chunk_ends is not None:
                    high = tl.load(chunk_ends + first + number).to(tl.int32)
                    position += high - low
                    low = high
                    column = (position - 1) // block_size
                    target = tl.load(slots + row.to(tl.int64) * slots_stride + column).to(tl.int64)
                    stored = (target >= 0) & (target != null_slot)
                    tl.store(ssm_state + target * slot_stride + of_state, s, in_dim & stored)
                left = next_left
                total = next_total
                place += DSTATE * DIM
                of_chunk += DIM
            tl.store(place, s, in_dim)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=[*_NUMBERS, *_POINTERS, "states"])
def _outputs(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    output,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    cu_seqlens,
    last_block,
    initial_block,
    chunk_ends,
    last_chunk,
    states,  # what chunks begin with; read for rows of several chunks alone
    rows,
    length,
    null_slot,
    one,
    A_channel,
    A_entry,
    slots_stride,
    write_stride,
    initial_stride,
    slot_stride,
    dim_stride,  # this and the next are None for a state that is dense within a slot
    dstate_stride,
    x_token,
    dt_token,
    z_token,
    output_token,
    B_token,
    C_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    chunk = program // (BLOCKS * GROUPS)
    group = program // BLOCKS % GROUPS
    in_group = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    in_dim = in_group < OF_GROUP
    channel = group * OF_GROUP + in_group

    row, low, high, is_first, is_last = _chunk(
        chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS
    )
    if row >= rows:
        return
    source = _source(row, slots, initial_block, slots_stride, null_slot)
    output += low.to(tl.int64) * output_token + channel
    if source < 0:
        for _ in range(low, high):
            tl.store(output, tl.zeros([BLOCK], tl.float32), in_dim)
            output += output_token
        return

    rates = _rates(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + channel, in_dim, other=0.0).to(tl.float32)

    x += low.to(tl.int64) * x_token + channel
    dt += low.to(tl.int64) * dt_token + channel
    B += low.to(tl.int64) * B_token + group * DSTATE
    C += low.to(tl.int64) * C_token + group * DSTATE
    some = low < high
    value = tl.load(x, in_dim & some, other=0.0)
    d = tl.load(dt, in_dim & some, other=0.0)
    if z is not None:
        z += low.to(tl.int64) * z_token + channel
        next_gate = tl.load(z, in_dim & some, other=0.0)

    # Behind what waits for no flag.
    s = ()
    for _ in tl.static_range(WIDTH):
        s += (tl.zeros([PARTS, BLOCK], tl.float32),)
    if (is_first & is_last) == 0:
        begun = states + chunk.to(tl.int64) * (DSTATE * DIM)
        s = _of_state(begun, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)
    elif is_set(row, has_initial_state, initial_stride):
        given = ssm_state + source * slot_stride
        if dim_stride is None:
            s = _of_state(given, channel, DSTATE, in_dim, 1, DSTATE, PARTS, WIDTH)
        else:
            s = _of_state(given, channel.to(tl.int64), dim_stride, in_dim, dstate_stride, DSTATE, PARTS, WIDTH)

    for t in range(low, high):
        # Taken out of where the next token's go before those are asked for: a register then waits for neither.
        rhs = value.to(tl.float32)
        step = d.to(tl.float32)
        more = (t + 1 < high).to(tl.int32)
        x += more * x_token
        dt += more * dt_token
        value = tl.load(x, in_dim, other=0.0)
        d = tl.load(dt, in_dim, other=0.0)
        if z is not None:
            gate = next_gate.to(tl.float32)
            z += more * z_token
            next_gate = tl.load(z, in_dim, other=0.0)
        b = _entries(B, DSTATE, PARTS, WIDTH, WORDS)
        c = _entries(C, DSTATE, PARTS, WIDTH, WORDS)
        B += B_token
        C += C_token
        step = _step_size(step, bias, SOFTPLUS)
        s = _after(s, step, step * rhs, rates, _numbers(b, B.dtype.element_ty, WIDTH, WORDS), WIDTH)
        c = _numbers(c, C.dtype.element_ty, WIDTH, WORDS)
        products = s[0] * c[0][:, None]
        for number in tl.static_range(1, WIDTH):
            products += s[number] * c[number][:, None]
        y = tl.sum(products, axis=0)
        if D is not None:
            y += rhs * skip
        if z is not None:
            y *= gate * tl.sigmoid(gate)
        tl.store(output, y, in_dim)
        output += output_token

    if is_last & (slot_stride >= 0):
        target = source
        stored = in_dim
        if last_block is not None:
            target = tl.load(slots + row.to(tl.int64) * slots_stride + tl.load(last_block + row)).to(tl.int64)
            stored = in_dim & (target >= 0) & (target != null_slot)
        elif write_slots is not None:
            target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = in_dim & (target >= 0) & (target != null_slot)
        left = ssm_state + target * slot_stride
        if dim_stride is None:
            _store_state(left, s, channel, DSTATE, stored, 1, DSTATE, PARTS, WIDTH)
        else:
            _store_state(left, s, channel.to(tl.int64), dim_stride, stored, dstate_stride, DSTATE, PARTS, WIDTH)


def selective_scan(call: "Arguments") -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    Every token of an activation must be dense: others are copied first, as are parameters and index tensors that are
    not, and an output that is not is written through a copy. States that are not dense within a slot are another
    variant.
    """
    x = call.x
    dt = call.dt
    B = call.B
    C = call.C
    D = call.D
    z = call.z
    dt_bias = call.dt_bias
    cu_seqlens = call.cu_seqlens
    ssm_state = call.ssm_state
    slots = call.slots
    write_slots = call.write_slots
    has_initial_state = call.has_initial_state
    first_block = call.first_block
    last_block = call.last_block
    initial_block = call.initial_block
    chunk_ends = call.chunk_ends
    last_chunk = call.last_chunk
    flat = cu_seqlens is not None
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    length = None if flat else x.shape[1]
    if rows == 0:
        return
    written = by_token(call.output, flat)
    x, dt, B, C = by_token(x, flat), by_token(dt, flat), by_token(B, flat), by_token(C, flat)
    z = None if z is None else by_token(z, flat)
    (dim, dstate), tokens, groups = call.A.shape, x.shape[0], B.shape[1] if B.dim() == 3 else 1
    if chunk_ends is not None:
        chunks = chunk_ends.shape[0]
    elif length is not None:
        chunks = rows * cdiv(length, CHUNK)
    else:
        chunks = tokens // CHUNK + rows
    several = chunk_ends is not None or chunks > rows  # a row may have more than one
    moves = write_slots is not None and ssm_state is not None and (length is None or length == 0)

    D, dt_bias = (None if t is None else t.contiguous() for t in (D, dt_bias))
    cu_seqlens, first_block, last_block, initial_block, chunk_ends, last_chunk = (
        None if t is None else t.contiguous()
        for t in (cu_seqlens, first_block, last_block, initial_block, chunk_ends, last_chunk)
    )
    slots, write_slots = (None if t is None else dense(t) for t in (slots, write_slots))
    slots, slots_stride = optional(slots, x, tl.int32)
    if ssm_state is None:  # then there is nothing to go on from, or to write
        has_initial_state = write_slots = None
    has_initial_state, initial_stride = optional(has_initial_state, x, tl.int1)
    write_stride = None if write_slots is None else write_slots.stride(0)
    slot_stride, dim_stride, dstate_stride = (-1, 0, 0) if ssm_state is None else ssm_state.stride()
    plain = ssm_state is None or is_dense(ssm_state)
    ssm_state, _ = optional(ssm_state, x, tl.float32)

    launches = _launches(x.get_device(), dim, dstate)
    ends, starts, outputs = (launches[kernel] for kernel in ("_ends", "_starts", "_outputs"))
    words = outputs["WIDTH"] % 4 == 0 and _in_words(B) and _in_words(C)
    sizes = {"DIM": dim, "DSTATE": dstate, "CHUNK": CHUNK, "BLOCK_ROWS": 128}
    sizes_of_tokens = {**sizes, "GROUPS": groups, "SOFTPLUS": call.dt_softplus, "WORDS": words}
    states = sums = None
    with on_device_of(x):
        if several and tokens:
            states = torch.empty(chunks, dstate, dim, dtype=torch.float32, device=x.device)
            sums = torch.empty(chunks, dim, dtype=torch.float32, device=x.device)
            _ends[(chunks * groups * cdiv(dim // groups, ends["BLOCK"]),)](
                x,
                dt,
                call.A,
                B,
                dt_bias,
                slots,
                cu_seqlens,
                initial_block,
                chunk_ends,
                last_chunk,
                states,
                sums,
                rows,
                length,
                call.null_slot,
                1,
                *call.A.stride(),
                slots_stride,
                x.stride(0),
                dt.stride(0),
                B.stride(0),
                **sizes_of_tokens,
                **ends,
            )
        if (several and tokens) or moves:
            _starts[(rows * cdiv(dim, starts["BLOCK"]) * dstate,)](
                call.A,
                ssm_state,
                slots,
                write_slots,
                has_initial_state,
                cu_seqlens,
                first_block,
                initial_block,
                chunk_ends,
                last_chunk,
                states,
                sums,
                length,
                call.null_slot,
                *call.A.stride(),
                slots_stride,
                write_stride,
                initial_stride,
                slot_stride,
                dim_stride,
                dstate_stride,
                call.block_size or None,
                **sizes,
                **starts,
            )
        if tokens == 0 or chunks == 0:
            return
        _outputs[(chunks * groups * cdiv(dim // groups, outputs["BLOCK"]),)](
            x,
            dt,
            call.A,
            B,
            C,
            D,
            z,
            dt_bias,
            written,
            ssm_state,
            slots,
            write_slots,
            has_initial_state,
            cu_seqlens,
            last_block,
            initial_block,
            chunk_ends,
            last_chunk,
            optional(states, x, tl.float32)[0],
            rows,
            length,
            call.null_slot,
            1,
            *call.A.stride(),
            slots_stride,
            write_stride,
            initial_stride,
            slot_stride,
            None if plain else dim_stride,
            None if plain else dstate_stride,
            x.stride(0),
            dt.stride(0),
            None if z is None else z.stride(0),
            written.stride(0),
            B.stride(0),
            C.stride(0),
            **sizes_of_tokens,
            **outputs,
        )
    write_back(written, call.output, flat)


def _in_words(tensor: Tensor) -> bool:
    """Whether the B or C of every token and group is made of whole words of four numbers of 2 bytes."""
    return tensor.itemsize == 2 and tensor.data_ptr() % 8 == 0 and (tensor.stride(0) | tensor.shape[-1]) % 4 == 0


@by_table(_ends="BLOCK num_warps", _starts="BLOCK num_warps", _outputs="BLOCK num_warps")
def _launches(dim: int, dstate: int) -> Launches:
    """A thread has a channel; interpreted, few operations on large tensors take less time than many."""
    padded = triton.next_power_of_2(dstate)
    width = min(padded, 16) if not INTERPRETED or padded <= 4 else 1
    parts = padded // width
    block = 32 if INTERPRETED else max(min(64 // parts, 32), 8)
    tokens = {"BLOCK": block, "PARTS": parts, "WIDTH": width, "num_warps": 1}
    return {"_ends": tokens, "_starts": {"BLOCK": 128, "num_warps": 1}, "_outputs": tokens}
