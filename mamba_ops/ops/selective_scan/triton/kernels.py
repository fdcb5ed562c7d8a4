"""The Mamba-1 recurrence over whole sequences, in segments of chunks that run side by side: three launches, or one.

`_ends` finds what chunks would leave if nothing came before them, but for those of a row's last segment. `_starts`
walks over these and turns that into the state before each segment. `_outputs` then runs every segment from its state.
Rows of one segment need the last one alone.

A segment has any number of chunks, and gives the same bits. At the end of a chunk, `_outputs` puts the state together
as `_starts` does: of the one that the chunk began with, the decay over it, and what it would leave of nothing.
"""

# mypy: disable-error-code="assignment"
# Tuples grow in what Triton compiles.
import triton.language as tl

from mamba_ops.ops._triton.common import kernel, load_flag, silu, slot_or
from mamba_ops.ops.selective_scan.triton.device import (
    block_slot,
    bounds,
    decay_rates,
    decays,
    load_entries,
    load_state,
    next_chunk,
    next_state,
    products,
    read_out,
    source_slot,
    step_size,
    store_state,
    zeros,
)

MORE_VARIANTS = {  # than two of a kernel that random calls of one pattern may compile: how many, and why
    "_outputs": (4, "B and C in words of 16 bytes or not; states that are dense within a slot or not"),
}


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
    segment,
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
    WAYS: tl.constexpr,  # sums of an output: see `read_out`
):
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    number = program // (BLOCKS * GROUPS)
    group = program // BLOCKS % GROUPS
    in_group = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    in_dim = in_group < OF_GROUP
    channel = group * OF_GROUP + in_group
    entry = tl.arange(0, PARTS)[:, None] * WIDTH
    channels = channel[None, :]
    inside = in_dim[None, :]

    row, low, high, is_first, is_last = bounds(
        number, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK * segment, BLOCK_ROWS
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

    rates = decay_rates(A, channels, A_channel, inside, A_entry, DSTATE, entry, WIDTH)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)
    skip = None
    if D is not None:
        skip = tl.load(D + channel, in_dim, other=0.0).to(tl.float32)

    apart = channel * (one - 1)
    B += low.to(tl.int64) * B_token + group * DSTATE + apart
    C += low.to(tl.int64) * C_token + group * DSTATE + apart
    x += low.to(tl.int64) * x_token + channel
    dt += low.to(tl.int64) * dt_token + channel
    there = in_dim & (low < high)
    next_value = tl.load(x, there, other=0.0)
    next_d = tl.load(dt, there, other=0.0)
    if z is not None:
        z += low.to(tl.int64) * z_token + channel
        next_gate = tl.load(z, there, other=0.0)

    # Behind what waits for no flag.
    s = zeros(rates[0], WIDTH)
    if (is_first & is_last) == 0:
        chunk = number
        if chunk_ends is None:
            chunk = low // CHUNK + row
        begun = states + chunk.to(tl.int64) * (DSTATE * DIM)
        s = load_state(begun, channels, one, inside, DIM, DSTATE, entry, WIDTH)
    elif load_flag(row, has_initial_state, initial_stride):
        initial = ssm_state + source * slot_stride
        if dim_stride is None:
            s = load_state(initial, channels, DSTATE, inside, 1, DSTATE, entry, WIDTH)
        else:
            s = load_state(initial, channels.to(tl.int64), dim_stride, inside, dstate_stride, DSTATE, entry, WIDTH)

    length_of_chunk = CHUNK
    if chunk_ends is not None:
        length_of_chunk = tl.maximum(high - low, 1)
    for begin in range(low, high, length_of_chunk):
        end = tl.minimum(begin + length_of_chunk, high)
        start = s
        left = zeros(rates[0], WIDTH)
        total = tl.zeros([BLOCK], tl.float32)
        for t in range(begin, end):
            # Taken out of where the next token's go before those are asked for: a register then waits for neither.
            value = next_value.to(tl.float32)
            d = next_d.to(tl.float32)
            more = in_dim & (t + 1 < high)
            x += x_token
            dt += dt_token
            next_value = tl.load(x, more, other=0.0)
            next_d = tl.load(dt, more, other=0.0)
            if z is not None:
                gate = next_gate.to(tl.float32)
                z += z_token
                next_gate = tl.load(z, more, other=0.0)
            b = load_entries(B, DSTATE, PARTS, WIDTH, WORDS)
            c = load_entries(C, DSTATE, PARTS, WIDTH, WORDS)
            step = step_size(d, bias, SOFTPLUS)
            decay = decays(step[None, :], rates, WIDTH)
            added = products((step * value)[None, :], b, WIDTH)
            s = next_state(s, decay, added, WIDTH)
            left = next_state(left, decay, added, WIDTH)  # as if the chunk began with nothing
            total += step
            y = tl.sum(read_out(s, c, WIDTH, WAYS), axis=0)
            if skip is not None:
                y = tl.fma(value, skip, y)
            if z is not None:
                y *= silu(gate, output.dtype.element_ty.primitive_bitwidth)
            tl.store(output, y, in_dim)
            B += B_token
            C += C_token
            output += output_token
        if end < high:
            s = next_chunk(start, rates, total[None, :], left, WIDTH)

    if is_last & (slot_stride >= 0):
        if last_block is not None:
            column = tl.load(last_block + row)
            target, stored = block_slot(row, column, slots, slots_stride, slots_columns, null_slot, slot_count)
            stored &= in_dim
        else:
            target = slot_or(source, row, write_slots, write_stride, null_slot, slot_count)
            stored = in_dim & (target >= 0)
        left = ssm_state + target * slot_stride
        if dim_stride is None:
            store_state(left, s, channels, DSTATE, stored[None, :], 1, DSTATE, entry, WIDTH)
        else:
            store_state(
                left, s, channels.to(tl.int64), dim_stride, stored[None, :], dstate_stride, DSTATE, entry, WIDTH
            )
