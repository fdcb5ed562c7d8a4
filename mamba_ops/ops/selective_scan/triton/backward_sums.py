"""The small launches of the selective scan's backward pass: what is between chunks, and sums over all of them."""

import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, row_chunks
from mamba_ops.ops._triton.decay import finite_rate


@kernel(first_number="rows", static="rates states sums adjoints")
def _carry(
    initial_states,
    grad_final_states,
    grad_initial_states,
    cu_seqlens,
    rates,
    states,  # the first of a chunk in: what it leaves; out: what it begins with
    sums,
    adjoints,  # in: of the state before a chunk, by the chunk alone; out: of the state after it
    rows,
    length,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    backwards = tl.program_id(0) % 2 == 1
    program = tl.program_id(0) // 2
    row = program // (BLOCKS * DSTATE)
    channel = program // DSTATE % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    entry = program % DSTATE
    in_dim = channel < DIM
    first, chunks, _, _ = row_chunks(row, rows, cu_seqlens, length, TILE * TILES, BLOCK_ROWS)
    rate = tl.load(rates + entry * DIM + channel, in_dim, other=0.0)
    of_row = row.to(tl.int64) * (DIM * DSTATE) + channel * DSTATE + entry

    carried = tl.zeros([BLOCK], tl.float32)
    step = 1
    if backwards:
        step = -1
        first += chunks - 1
        place = adjoints + first.to(tl.int64) * (DSTATE * DIM) + entry * DIM + channel
        place_step = -DSTATE * DIM
        if grad_final_states is not None:
            carried = tl.load(grad_final_states + of_row, in_dim, other=0.0).to(tl.float32)
    else:
        place = states + first.to(tl.int64) * (TILES * DSTATE * DIM) + entry * DIM + channel
        place_step = TILES * DSTATE * DIM
        if initial_states is not None:
            carried = tl.load(initial_states + of_row, in_dim, other=0.0).to(tl.float32)
    of_chunk = sums + first.to(tl.int64) * (TILES * DIM) + channel
    added = tl.load(place, in_dim & (chunks > 0), other=0.0)
    total = tl.load(of_chunk, in_dim & (chunks > 0), other=0.0)
    for number in range(chunks):
        there = in_dim & (number + 1 < chunks)
        of_chunk += step * TILES * DIM
        next_added = tl.load(place + place_step, there, other=0.0)
        next_total = tl.load(of_chunk, there, other=0.0)
        tl.store(place, carried, in_dim)
        carried = carried * tl.exp2(rate * total) + added
        added = next_added
        total = next_total
        place += place_step
    if grad_initial_states is not None:
        tl.store(grad_initial_states + of_row, carried, in_dim & backwards)


@kernel(first_number="rows", static="rates arranged")
def _arrange(
    A,
    B,
    C,
    cu_seqlens,
    rates,  # out: (dstate, dim), of decay
    arranged,  # out: (chunks, TILES, groups, dstate, TILE, 2), of B and C; zero where there is no token
    rows,
    length,
    A_channel,
    A_entry,
    B_token,
    C_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VALUES: tl.constexpr = 2 * TILE
    OF_RATES: tl.constexpr = (DIM + 31) // 32
    entry = tl.arange(0, BLOCK)[:, None]
    program = tl.program_id(0)
    if program < OF_RATES:
        channel = (program * 32 + tl.arange(0, 32))[None, :]
        there = (channel < DIM) & (entry < DSTATE)
        rate = tl.load(A + channel * A_channel + entry * A_entry, there, other=0.0).to(tl.float32)
        tl.store(rates + entry * DIM + channel, finite_rate(rate * 1.4426950408889634), there)
        return
    program -= OF_RATES
    group = program % GROUPS
    tile = program // GROUPS % TILES
    row, low, high, _, _ = chunk_bounds(program // (GROUPS * TILES), cu_seqlens, rows, length, TILE * TILES, BLOCK_ROWS)
    if row >= rows:
        return
    lane = tl.arange(0, VALUES)[None, :]
    t = low + tile * TILE + lane // 2
    there = (t < high) & (entry < DSTATE)
    of_entry = group * DSTATE + entry
    is_C = lane % 2 == 1
    values = tl.load(B + t.to(tl.int64) * B_token + of_entry, there & (lane % 2 == 0), other=0.0).to(tl.float32)
    values += tl.load(C + t.to(tl.int64) * C_token + of_entry, there & is_C, other=0.0).to(tl.float32)
    place = arranged + (tile + (program // (GROUPS * TILES)).to(tl.int64) * TILES) * (GROUPS * DSTATE * VALUES)
    tl.store(place + group * (DSTATE * VALUES) + entry * VALUES + lane, values, entry < DSTATE)


@kernel(first_number="chunks", static="of_chunks")
def _sum_chunks(
    of_chunks,
    grad_A,
    grad_D,
    grad_dt_bias,
    chunks,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) % (DSTATE + 2)
    channel = tl.program_id(0) // (DSTATE + 2) * BLOCK + tl.arange(0, BLOCK)
    in_dim = channel < DIM
    total = tl.zeros([BLOCK_CHUNKS, BLOCK], tl.float32)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        place = of_chunks + chunk.to(tl.int64)[:, None] * ((DSTATE + 2) * DIM) + entry * DIM + channel[None, :]
        total += tl.load(place, (chunk < chunks)[:, None] & in_dim[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    tl.store(grad_A + channel * DSTATE + entry, total, in_dim & (entry < DSTATE))
    if grad_D is not None:
        tl.store(grad_D + channel, total, in_dim & (entry == DSTATE))
    if grad_dt_bias is not None:
        tl.store(grad_dt_bias + channel, total, in_dim & (entry == DSTATE + 1))


@kernel(first_number="rows", static="of_blocks")
def _sum_blocks(
    of_blocks,
    grad_B,
    grad_C,
    cu_seqlens,
    rows,
    length,
    chunks,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    VALUES: tl.constexpr = 2 * TILE
    BLOCKS: tl.constexpr = (DIM // GROUPS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    group = program % GROUPS
    tile = program // GROUPS % TILES
    chunk = program // (GROUPS * TILES)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, TILE * TILES, BLOCK_ROWS)
    if row >= rows:
        return
    entry = tl.arange(0, BLOCK_STATE)
    lane = tl.arange(0, VALUES)
    t = low + tile * TILE + lane // 2
    in_state = (entry < DSTATE)[:, None]
    place = of_blocks + (chunk.to(tl.int64) * TILES + tile) * (GROUPS * DSTATE * VALUES)
    place = place + group * (DSTATE * VALUES) + entry[:, None] * VALUES + lane[None, :]
    there = (t < high)[None, :] & in_state
    total = tl.zeros([BLOCK_STATE, VALUES], tl.float32)
    for start in range(0, BLOCKS, 4):
        for more in tl.static_range(4):  # four reads at once
            total += tl.load(place, there & (start + more < BLOCKS), other=0.0)
            place += chunks.to(tl.int64) * (TILES * GROUPS * DSTATE * VALUES)
    offset = (t.to(tl.int64) * GROUPS + group)[None, :] * DSTATE + entry[:, None]
    tl.store(grad_B + offset, total, there & (lane % 2 == 0)[None, :])
    tl.store(grad_C + offset, total, there & (lane % 2 == 1)[None, :])
