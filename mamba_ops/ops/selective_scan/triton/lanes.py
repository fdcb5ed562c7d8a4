"""The last launch of the selective scan for many channels in all rows: lanes of a warp share states.

Four lanes share the states of two channels, and take four tokens at a time, each lane one of them: they exchange step
sizes and parts of outputs, and each number of B and C that is converted serves two channels. A row has twice as many
warps so as where a thread has a channel (`kernels._outputs`), and need not be cut into segments. The bits are the same.
A row alone is slower, as too few warps hide what each waits for.
"""

# mypy: disable-error-code="assignment,misc,operator"
# Tuples grow in what Triton compiles.
import triton.language as tl

from mamba_ops.ops._triton.common import kernel, load_flag, slot_or
from mamba_ops.ops.selective_scan.triton.device import (
    block_slot,
    bounds,
    decay_rates,
    in_float32,
    load_state,
    next_chunk,
    source_slot,
    store_state,
    zeros,
)
from mamba_ops.ops.selective_scan.triton.lanes_device import (
    advance,
    load_tile,
    load_words,
    tile_outputs,
    words_in_float32,
)

MORE_VARIANTS = {  # than two of a kernel that random calls of one pattern may compile: how many, and why
    "_lanes": (4, "B and C in words or not; states that are dense within a slot or not"),
}


@kernel(first_number="rows")
def _lanes(
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
    PARTS: tl.constexpr,  # of a state, and tokens of a tile
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,  # of adding parts: log2(PARTS)
    CHANNELS: tl.constexpr,  # of a lane
):
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    APART: tl.constexpr = BLOCK // CHANNELS  # channels of a lane, in memory; lanes of a channel's neighboring parts
    LANES: tl.constexpr = PARTS * APART
    program = tl.program_id(0)
    number = program // (BLOCKS * GROUPS)
    group = program // BLOCKS % GROUPS
    lane = tl.arange(0, LANES)
    part = lane // APART  # the lane's, of states and of tiles
    in_group = program % BLOCKS * BLOCK + lane % APART
    in_dim = ()
    once = ()
    for i in tl.static_range(CHANNELS):
        in_dim += (in_group + i * APART < OF_GROUP,)
        once += (in_dim[i] & (part == 0),)
    channel = group * OF_GROUP + in_group

    row, low, high, is_first, is_last = bounds(
        number, cu_seqlens, None, None, rows, length, CHUNK * segment, BLOCK_ROWS
    )
    if row >= rows:
        return
    source = source_slot(row, slots, initial_block, slots_stride, slots_columns, null_slot, slot_count)
    of_output = output + low.to(tl.int64) * output_token + part * output_token.to(tl.int64) + channel
    if source < 0:
        for t in range(low, high, PARTS):
            for i in tl.static_range(CHANNELS):
                tl.store(of_output + i * APART, tl.zeros([LANES], tl.float32), in_dim[i] & (t + part < high))
            of_output += PARTS * output_token.to(tl.int64)
        return

    entry = part * WIDTH
    rates = ()
    bias = None
    if dt_bias is not None:
        bias = ()
    skip = None
    if D is not None:
        skip = ()
    for i in tl.static_range(CHANNELS):
        rates += decay_rates(A, channel + i * APART, A_channel, in_dim[i], A_entry, DSTATE, entry, WIDTH)
        if dt_bias is not None:
            bias += (tl.load(dt_bias + channel + i * APART, in_dim[i], other=0.0).to(tl.float32),)
        if D is not None:
            skip += (tl.load(D + channel + i * APART, in_dim[i], other=0.0).to(tl.float32),)

    tiles = tl.maximum(high - low, 0) // PARTS
    until = low + tiles * PARTS
    first_read = tl.where(tiles > 0, low, 0).to(tl.int64)  # without a whole tile the first token of all, which is there
    apart = group * DSTATE + entry + channel * (one - 1)
    of_B = B + first_read * B_token + apart
    of_C = C + first_read * C_token + apart
    of_x = x + low.to(tl.int64) * x_token + part * x_token.to(tl.int64) + channel
    of_dt = dt + low.to(tl.int64) * dt_token + part * dt_token.to(tl.int64) + channel
    of_z = None
    if z is not None:
        of_z = z + low.to(tl.int64) * z_token + part * z_token.to(tl.int64) + channel

    # Behind what waits for no flag.
    s = zeros(entry, CHANNELS * WIDTH)
    if (is_first & is_last) == 0:
        begun = states + (low // CHUNK + row).to(tl.int64) * (DSTATE * DIM)
        found = ()
        for i in tl.static_range(CHANNELS):
            found += load_state(begun, channel + i * APART, one, in_dim[i], DIM, DSTATE, entry, WIDTH)
        s = found
    elif load_flag(row, has_initial_state, initial_stride):
        initial = ssm_state + source * slot_stride
        found = ()
        for i in tl.static_range(CHANNELS):
            of_state = channel + i * APART
            if dim_stride is None:
                found += load_state(initial, of_state, DSTATE, in_dim[i], 1, DSTATE, entry, WIDTH)
            else:
                found += load_state(
                    initial, of_state.to(tl.int64), dim_stride, in_dim[i], dstate_stride, DSTATE, entry, WIDTH
                )
        s = found

    PER: tl.constexpr = 2 if z is None else 3  # numbers of a token and channel
    ahead = ()  # x, dt and z of two tiles
    for k in tl.static_range(2):
        ahead += load_tile(of_x, of_dt, of_z, k < tiles, in_dim, APART)
        of_x += PARTS * x_token.to(tl.int64)
        of_dt += PARTS * dt_token.to(tl.int64)
        if z is not None:
            of_z += PARTS * z_token.to(tl.int64)
    some = tiles > 0
    bs = load_words(of_B, tl.where(some, B_token, 0), entry, DSTATE, PARTS, PARTS, WIDTH, WORDS)
    cs = load_words(of_C, tl.where(some, C_token, 0), entry, DSTATE, PARTS, PARTS, WIDTH, WORDS)
    for begin in range(low, until, CHUNK):
        end = tl.minimum(begin + CHUNK, until)
        start = s
        left = zeros(entry, CHANNELS * WIDTH)
        total = zeros(entry, CHANNELS)
        for t in range(begin, end, PARTS):
            # Taken out of where the next tile's go before those are asked for: a register then waits for neither.
            now = in_float32(ahead[: CHANNELS * PER])
            b = words_in_float32(bs, B.dtype.element_ty, WORDS)
            c = words_in_float32(cs, C.dtype.element_ty, WORDS)
            more = t + PARTS < until
            later = t + 2 * PARTS < until
            ahead = ahead[CHANNELS * PER :] + load_tile(of_x, of_dt, of_z, later, in_dim, APART)
            of_x += advance(more, x_token, PARTS)
            of_dt += advance(more, dt_token, PARTS)
            if z is not None:
                of_z += advance(more, z_token, PARTS)
            of_B += advance(more, B_token, PARTS)  # of the last tile once more
            of_C += advance(more, C_token, PARTS)
            bs = load_words(of_B, B_token, entry, DSTATE, PARTS, PARTS, WIDTH, WORDS)
            cs = load_words(of_C, C_token, entry, DSTATE, PARTS, PARTS, WIDTH, WORDS)
            found = tile_outputs(
                of_output, s, left, total, now, b, c, rates, bias, skip, lane, in_dim, SOFTPLUS, APART, CHANNELS, PARTS,
                WIDTH, LEVELS, z is not None,
            )  # fmt: skip
            s = found[: CHANNELS * WIDTH]
            left = found[CHANNELS * WIDTH : 2 * CHANNELS * WIDTH]
            total = found[2 * CHANNELS * WIDTH :]
            of_output += advance(more, output_token, PARTS)
        if (end < high) & (end == begin + CHUNK):
            found = ()
            for i in tl.static_range(CHANNELS):
                its_start = start[i * WIDTH : (i + 1) * WIDTH]
                its_left = left[i * WIDTH : (i + 1) * WIDTH]
                found += next_chunk(its_start, rates[i * WIDTH : (i + 1) * WIDTH], total[i], its_left, WIDTH)
            s = found
    nothing = zeros(entry, CHANNELS * WIDTH)
    no_sum = zeros(entry, CHANNELS)
    at = until.to(tl.int64)
    for _ in range(until, high):  # less than a tile: every lane has one token
        its_z = None
        if z is not None:
            its_z = z + at * z_token + channel
        its_tile = load_tile(x + at * x_token + channel, dt + at * dt_token + channel, its_z, True, in_dim, APART)
        its_B = load_words(B + at * B_token + apart, B_token, entry, DSTATE, PARTS, 1, WIDTH, WORDS)
        its_C = load_words(C + at * C_token + apart, C_token, entry, DSTATE, PARTS, 1, WIDTH, WORDS)
        b = words_in_float32(its_B, B.dtype.element_ty, WORDS)
        c = words_in_float32(its_C, C.dtype.element_ty, WORDS)
        to = output + at * output_token + channel
        found = tile_outputs(
            to, s, nothing, no_sum, in_float32(its_tile), b, c, rates, bias, skip, lane, once, SOFTPLUS, APART,
            CHANNELS, 1, WIDTH, LEVELS, z is not None,
        )  # fmt: skip
        s = found[: CHANNELS * WIDTH]
        at += 1

    if is_last & (slot_stride >= 0):
        if last_block is not None:
            column = tl.load(last_block + row)
            target, stored = block_slot(row, column, slots, slots_stride, slots_columns, null_slot, slot_count)
        else:
            target = slot_or(source, row, write_slots, write_stride, null_slot, slot_count)
            stored = target >= 0
        kept = ssm_state + target * slot_stride
        for i in tl.static_range(CHANNELS):
            of_state = channel + i * APART
            mine = s[i * WIDTH : (i + 1) * WIDTH]
            here = stored & in_dim[i]
            if dim_stride is None:
                store_state(kept, mine, of_state, DSTATE, here, 1, DSTATE, entry, WIDTH)
            else:
                store_state(kept, mine, of_state.to(tl.int64), dim_stride, here, dstate_stride, DSTATE, entry, WIDTH)
