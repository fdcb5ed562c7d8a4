"""The Mamba-1 recurrence over whole sequences, in chunks of tokens that run side by side: three launches, or one.

`_ends` finds what every chunk but a row's last would leave if nothing came before it. `_starts` walks over the chunks
of a row and turns that into the state before each of them. `_outputs` then runs every chunk from its state. Rows of one
chunk need the last one alone, and give the same bits either way.
"""

# mypy: disable-error-code="assignment"
# Tuples grow in what Triton compiles.
import triton.language as tl

from mamba_ops.ops._triton.common import is_slot, kernel, load_flag, row_chunks, within
from mamba_ops.ops._triton.decay import finite_rate
from mamba_ops.ops.selective_scan.triton.device import (
    as_float32,
    block_slot,
    bounds,
    decay_rates,
    load_entries,
    load_state,
    next_state,
    source_slot,
    step_size,
    store_state,
)

MORE_VARIANTS = {  # than two of a kernel that random calls of one pattern may compile: how many, and why
    "_outputs": (4, "B and C in words of four numbers or not; states that are dense within a slot or not"),
}


@kernel(first_number="rows", static="states sums")
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
    length,  # of a row; with cu_seqlens that of all rows together
    null_slot,
    slot_count,
    one,
    A_channel,
    A_entry,
    slots_stride,
    slots_columns,
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

    row, low, high, _, is_last = bounds(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS)
    if (row >= rows) | is_last:
        return
    if source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count) < 0:
        return
    rates = decay_rates(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
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
        b = load_entries(B, DSTATE, PARTS, WIDTH, WORDS)
        B += B_token
        step = step_size(step, bias, SOFTPLUS)
        s = next_state(s, step, step * rhs, rates, as_float32(b, B.dtype.element_ty, WIDTH, WORDS), WIDTH)
        total += step
    states += chunk.to(tl.int64) * (DSTATE * DIM)
    store_state(states, s, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)
    tl.store(sums + chunk.to(tl.int64) * DIM + channel * one, total, in_dim)


@kernel(first_number="length", static="states sums")
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
    length,  # of a row; with cu_seqlens that of all rows together
    null_slot,
    slot_count,
    A_channel,
    A_entry,
    slots_stride,
    slots_columns,
    write_stride,
    initial_stride,
    slot_stride,
    dim_stride,
    dstate_stride,
    block_size,
    given_chunks,  # how many chunk_ends has
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
    rows = tl.num_programs(0) // (BLOCKS * DSTATE)

    source = source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count)
    if source < 0:
        return
    if chunk_ends is not None:
        first = within(tl.load(last_chunk + row - 1, row > 0, other=-1).to(tl.int32) + 1, given_chunks)
        chunks = within(tl.load(last_chunk + row).to(tl.int32) + 1, given_chunks) - first
        low = within(tl.load(chunk_ends + first - 1, first > 0, other=0), length).to(tl.int32)
        count = chunks
    else:
        first, chunks, low, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)

    of_state = channel.to(tl.int64) * dim_stride + entry.to(tl.int64) * dstate_stride
    carried = in_dim & load_flag(row, has_initial_state, initial_stride)
    s = tl.load(ssm_state + source * slot_stride + of_state, carried, other=0.0).to(tl.float32)

    if write_slots is not None:
        if count <= 0:  # no token, no chunk: the state moves as it is
            target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = (target != source) & is_slot(target, null_slot, slot_count)
            tl.store(ssm_state + target * slot_stride + of_state, s, in_dim & stored)

    if states is not None:
        if chunks > 1:
            position = low
            if chunk_ends is not None:
                high = within(tl.load(chunk_ends + first), length).to(tl.int32)
                position = tl.load(first_block + row).to(tl.int32) * block_size
                position += tl.maximum(block_size - (high - low), 0)
            rate = tl.load(A + channel * A_channel + entry * A_entry, in_dim, other=0.0).to(tl.float32)
            rate = finite_rate(rate * 1.4426950408889634)
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
                    high = within(tl.load(chunk_ends + first + number), length).to(tl.int32)
                    position += high - low
                    low = high
                    column = (position - 1) // block_size
                    target, stored = block_slot(row, column, slots, slots_stride, slots_columns, null_slot, slot_count)
                    tl.store(ssm_state + target * slot_stride + of_state, s, in_dim & stored)
                left = next_left
                total = next_total
                place += DSTATE * DIM
                of_chunk += DIM
            tl.store(place, s, in_dim)


@kernel(first_number="rows")
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
    length,  # of a row; with cu_seqlens that of all rows together
    null_slot,
    slot_count,
    one,
    A_channel,
    A_entry,
    slots_stride,
    slots_columns,
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

    row, low, high, is_first, is_last = bounds(
        chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS
    )
    if row >= rows:
        return
    source = source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count)
    output += low.to(tl.int64) * output_token + channel
    if source < 0:
        for _ in range(low, high):
            tl.store(output, tl.zeros([BLOCK], tl.float32), in_dim)
            output += output_token
        return

    rates = decay_rates(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
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
        s = load_state(begun, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)
    elif load_flag(row, has_initial_state, initial_stride):
        initial = ssm_state + source * slot_stride
        if dim_stride is None:
            s = load_state(initial, channel, DSTATE, in_dim, 1, DSTATE, PARTS, WIDTH)
        else:
            s = load_state(initial, channel.to(tl.int64), dim_stride, in_dim, dstate_stride, DSTATE, PARTS, WIDTH)

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
        b = load_entries(B, DSTATE, PARTS, WIDTH, WORDS)
        c = load_entries(C, DSTATE, PARTS, WIDTH, WORDS)
        B += B_token
        C += C_token
        step = step_size(step, bias, SOFTPLUS)
        s = next_state(s, step, step * rhs, rates, as_float32(b, B.dtype.element_ty, WIDTH, WORDS), WIDTH)
        c = as_float32(c, C.dtype.element_ty, WIDTH, WORDS)
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
            column = tl.load(last_block + row)
            target, stored = block_slot(row, column, slots, slots_stride, slots_columns, null_slot, slot_count)
            stored &= in_dim
        elif write_slots is not None:
            target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = in_dim & is_slot(target, null_slot, slot_count)
        left = ssm_state + target * slot_stride
        if dim_stride is None:
            store_state(left, s, channel, DSTATE, stored, 1, DSTATE, PARTS, WIDTH)
        else:
            store_state(left, s, channel.to(tl.int64), dim_stride, stored, dstate_stride, DSTATE, PARTS, WIDTH)
