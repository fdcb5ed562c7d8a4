"""The backward pass of the selective scan, in chunks of tokens that run side by side: six launches.

`_boundaries` finds what every chunk would leave if nothing came before it, and the gradient of the state before it if
nothing came after it. `_carry` walks over the chunks of a row, forwards and backwards, and turns these into the state
before each chunk and the gradient of the state after it. `_gradients` then runs every chunk alone, tile by tile from
its last one on, with B and C as `_arrange` lays them out. What it finds of sums over tokens it leaves by chunk, what it
finds of sums over channels by block of channels: `_sum_chunks` and `_sum_blocks` add these up, in one order.
"""

# mypy: disable-error-code="assignment,misc"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel
from mamba_ops.ops._triton.decay import finite_rate
from mamba_ops.ops.selective_scan.triton.device import (
    decay_rates,
    load_entries,
    step_size,
    store_state,
)


@triton.jit
def _of_chunk(program, DIM: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    # A program's chunk, its group, its block of channels in the group, these channels, and whether there are such.
    OF_GROUP: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (OF_GROUP + BLOCK - 1) // BLOCK
    block = program % BLOCKS
    group = program // BLOCKS % GROUPS
    in_group = block * BLOCK + tl.arange(0, BLOCK)
    return program // (BLOCKS * GROUPS), group, block, group * OF_GROUP + in_group, in_group < OF_GROUP


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp2(v * -1.4426950408889634))  # tl.exp takes three more instructions, for denormals


@kernel(first_number="rows", static="states sums adjoints")
def _boundaries(
    x,
    dt,
    A,
    B,
    C,
    z,
    dt_bias,
    grad_output,
    cu_seqlens,
    states,  # out: (chunks, TILES, dstate, dim), of the chunk's end, then before its other tiles
    sums,  # out: (chunks, TILES, dim), of the step sizes up to there
    adjoints,  # out: (chunks, dstate, dim), of the state before the chunk
    rows,
    length,
    one,
    A_channel,
    A_entry,
    x_token,
    dt_token,
    z_token,
    grad_token,
    B_token,
    C_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    chunk, group, _, channel, in_dim = _of_chunk(tl.program_id(0), DIM, GROUPS, BLOCK)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, TILE * TILES, BLOCK_ROWS)
    if row >= rows:
        return
    rates = decay_rates(A, channel, A_channel, in_dim, A_entry, DSTATE, PARTS, WIDTH)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)

    x += low.to(tl.int64) * x_token + channel
    dt += low.to(tl.int64) * dt_token + channel
    grad_output += low.to(tl.int64) * grad_token + channel
    B += low.to(tl.int64) * B_token + group * DSTATE
    C += low.to(tl.int64) * C_token + group * DSTATE
    if z is not None:
        z += low.to(tl.int64) * z_token + channel
    apart = channel * (one - 1)
    states += chunk.to(tl.int64) * (TILES * DSTATE * DIM)
    sums += chunk.to(tl.int64) * (TILES * DIM) + channel * one

    s = ()
    through = ()
    gained = ()
    for _ in tl.static_range(WIDTH):
        s += (tl.zeros([PARTS, BLOCK], tl.float32),)
        through += (tl.full([PARTS, BLOCK], 1.0, tl.float32),)
        gained += (tl.zeros([PARTS, BLOCK], tl.float32),)
    total = tl.zeros([BLOCK], tl.float32)
    for t in range(high - low):
        if (t % TILE == 0) & (t > 0):
            store_state(states + t // TILE * (DSTATE * DIM), s, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)
            tl.store(sums + t // TILE * DIM, total, in_dim)
        step = step_size(tl.load(dt, in_dim, other=0.0).to(tl.float32), bias, SOFTPLUS)
        pushed = step * tl.load(x, in_dim, other=0.0).to(tl.float32)
        pulled = tl.load(grad_output, in_dim, other=0.0).to(tl.float32)
        if z is not None:
            gate = tl.load(z, in_dim, other=0.0).to(tl.float32)
            pulled *= gate * _sigmoid(gate)
            z += z_token
        b = load_entries(B, apart, DSTATE, PARTS, WIDTH, WORDS)
        c = load_entries(C, apart, DSTATE, PARTS, WIDTH, WORDS)
        x += x_token
        dt += dt_token
        grad_output += grad_token
        B += B_token
        C += C_token
        total += step
        s_after = ()
        through_after = ()
        gained_after = ()
        for number in tl.static_range(WIDTH):
            decay = tl.exp2(rates[number] * step[None, :])
            s_after += (s[number] * decay + pushed[None, :] * b[number],)
            through_after += (through[number] * decay,)
            gained_after += (gained[number] + through_after[number] * (pulled[None, :] * c[number]),)
        s = s_after
        through = through_after
        gained = gained_after
    store_state(states, s, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)
    tl.store(sums, total, in_dim)
    adjoints += chunk.to(tl.int64) * (DSTATE * DIM)
    store_state(adjoints, gained, channel, one, in_dim, DIM, DSTATE, PARTS, WIDTH)


@triton.jit
def _across(values, BLOCK: tl.constexpr):
    # The sums of every 32nd number.
    return tl.sum(tl.reshape(values, [BLOCK // 32, 32]), axis=0)


@triton.jit
def _halve(values, APART: tl.constexpr):
    # Half as many tensors of 32: of every two, adds the numbers that are APART, and has the sums of the first tensor
    # where that bit of the place is not set, those of the second where it is.
    sums = ()
    for pair in tl.static_range(len(values) // 2):
        one = tl.sum(tl.reshape(values[2 * pair], [16 // APART, 2, APART]), axis=1)
        other = tl.sum(tl.reshape(values[2 * pair + 1], [16 // APART, 2, APART]), axis=1)
        is_one = (tl.arange(0, 2) == 0)[None, :, None]
        both = tl.where(is_one, tl.expand_dims(one, 1), tl.expand_dims(other, 1))
        sums += (tl.reshape(both, [32]),)
    return sums


@triton.jit
def _pair(arranged, t):
    # A token's number of B and that of C, which lie side by side: one read.
    both = tl.load(arranged.to(tl.pointer_type(tl.int64), bitcast=True) + t)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@kernel(first_number="rows", static="arranged states sums adjoints of_chunks of_blocks")
def _gradients(
    x,
    dt,
    A,
    arranged,
    D,
    z,
    dt_bias,
    grad_output,
    cu_seqlens,
    states,
    sums,
    adjoints,  # of the state after a tile, from the chunk's last one to its first
    grad_x,
    grad_dt,
    grad_z,
    of_chunks,  # out: (chunks, dstate + 2, dim), gradients of A, D and dt_bias by the chunk alone
    of_blocks,  # out: (blocks, chunks, TILES, groups, dstate, TILE, 2), gradients of B and C by the block alone
    rows,
    length,
    chunks,
    A_channel,
    A_entry,
    x_token,
    dt_token,
    z_token,
    grad_token,
    grad_x_token,
    grad_dt_token,
    grad_z_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,  # of merging: log2(2 * TILE)
):
    VALUES: tl.constexpr = 2 * TILE  # gradients of B and C in a tile, of one entry
    chunk, group, block, channel, in_dim = _of_chunk(tl.program_id(0), DIM, GROUPS, BLOCK)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, TILE * TILES, BLOCK_ROWS)
    of_chunks += chunk.to(tl.int64) * ((DSTATE + 2) * DIM) + channel
    if row >= rows:
        for entry in range(DSTATE + 2):
            tl.store(of_chunks + entry * DIM, tl.zeros([BLOCK], tl.float32), in_dim)
        return
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        skip = tl.load(D + channel, in_dim, other=0.0).to(tl.float32)
    A += channel * A_channel
    states += chunk.to(tl.int64) * (TILES * DSTATE * DIM) + channel
    sums += chunk.to(tl.int64) * (TILES * DIM) + channel
    adjoints += chunk.to(tl.int64) * (DSTATE * DIM) + channel
    grad_skip = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)

    tiles = (high - low + TILE - 1) // TILE
    for number in range(tiles):
        tile = tiles - 1 - number
        start = low + tile * TILE
        d = ()
        u = ()
        pulled = ()
        at = start.to(tl.int64)
        x_tile = x + at * x_token + channel
        dt_tile = dt + at * dt_token + channel
        grad_tile = grad_output + at * grad_token + channel
        if z is not None:
            z_tile = z + at * z_token + channel
        for t in tl.static_range(TILE):
            there = in_dim & (start + t < high)
            step = step_size(tl.load(dt_tile, there, other=0.0).to(tl.float32), bias, SOFTPLUS)
            step = tl.where(there, step, 0.0)
            value = tl.load(x_tile, there, other=0.0).to(tl.float32)
            grad = tl.load(grad_tile, there, other=0.0).to(tl.float32)
            if z is not None:
                gate = tl.load(z_tile, there, other=0.0).to(tl.float32)
                grad *= gate * _sigmoid(gate)
                z_tile += z_token
            x_tile += x_token
            dt_tile += dt_token
            grad_tile += grad_token
            d += (step,)
            u += (step * value,)
            pulled += (grad,)

        grad_u = ()  # this and the next two: from the last token to the first
        grad_d = ()
        read = ()
        for t in tl.static_range(TILE):  # noqa: B007 - `_` has another type where it is used above
            grad_u += (tl.zeros([BLOCK], tl.float32),)
            grad_d += (tl.zeros([BLOCK], tl.float32),)
            read += (tl.zeros([BLOCK], tl.float32),)
        later = in_dim & (tile > 0)
        total = tl.load(sums + tile * DIM, later, other=0.0)
        of_tile = ((chunk.to(tl.int64) * TILES + tile) * GROUPS + group) * (DSTATE * VALUES)
        entries = arranged + of_tile
        place = of_blocks + block * (chunks.to(tl.int64) * (TILES * GROUPS * DSTATE * VALUES))
        place += of_tile + tl.arange(0, VALUES)
        # What an entry needs is read while the one before it is computed.
        next_rate = tl.load(A, in_dim, other=0.0).to(tl.float32)
        next_s = tl.load(states, in_dim, other=0.0)
        next_gained = tl.load(states + tile * (DSTATE * DIM), later, other=0.0)
        next_grad_s = tl.load(adjoints, in_dim, other=0.0)
        next_earlier = tl.load(of_chunks, in_dim & (number > 0), other=0.0)
        for entry in range(DSTATE):
            rate = finite_rate(next_rate * 1.4426950408889634)
            s = next_s * tl.exp2(rate * total) + next_gained
            grad_s = next_grad_s
            earlier = next_earlier
            after = entry + 1
            is_there = in_dim & (after < DSTATE)
            next_rate = tl.load(A + after * A_entry, is_there, other=0.0).to(tl.float32)
            next_s = tl.load(states + after * DIM, is_there, other=0.0)
            next_gained = tl.load(states + tile * (DSTATE * DIM) + after * DIM, later & is_there, other=0.0)
            next_grad_s = tl.load(adjoints + after * DIM, is_there, other=0.0)
            next_earlier = tl.load(of_chunks + after * DIM, is_there & (number > 0), other=0.0)
            bs = ()
            cs = ()
            for t in tl.static_range(TILE):
                b, c = _pair(entries + entry * VALUES, t)
                bs += (b,)
                cs += (c,)
            decays = ()
            kept = ()
            for t in tl.static_range(TILE):
                decays += (tl.exp2(rate * d[t]),)
                kept += (decays[t] * s,)
                s = kept[t] + u[t] * bs[t]

            grad_rate = tl.zeros([BLOCK], tl.float32)
            grad_u_after = ()
            grad_d_after = ()
            read_after = ()
            merged = ()
            for t in tl.static_range(TILE - 1, -1, -1):
                s = kept[t] + u[t] * bs[t]
                grad_s += pulled[t] * cs[t]
                grad_exponent = grad_s * kept[t]
                grad_u_after += (grad_u[TILE - 1 - t] + grad_s * bs[t],)
                grad_d_after += (grad_d[TILE - 1 - t] + grad_exponent * rate,)
                read_after += (read[TILE - 1 - t] + s * cs[t],)
                grad_rate += grad_exponent * d[t]
                of_token = _halve((_across(u[t] * grad_s, BLOCK), _across(pulled[t] * s, BLOCK)), 1)
                merged = of_token + merged
                grad_s *= decays[t]
            grad_u = grad_u_after
            grad_d = grad_d_after
            read = read_after
            for level in tl.static_range(1, LEVELS):
                merged = _halve(merged, 2**level)
            found = tl.sum(tl.reshape(merged[0], [32 // VALUES, VALUES]), axis=0)
            tl.store(place + entry * VALUES, found)
            tl.store(adjoints + entry * DIM, grad_s, in_dim)
            tl.store(of_chunks + entry * DIM, earlier + grad_rate, in_dim)

        grad_x_tile = grad_x + (at + TILE) * grad_x_token + channel
        grad_dt_tile = grad_dt + (at + TILE) * grad_dt_token + channel
        if z is not None:
            grad_z_tile = grad_z + (at + TILE) * grad_z_token + channel
        for t in tl.static_range(TILE - 1, -1, -1):
            there = in_dim & (start + t < high)
            x_tile -= x_token
            dt_tile -= dt_token
            grad_tile -= grad_token
            grad_x_tile -= grad_x_token
            grad_dt_tile -= grad_dt_token
            value = tl.load(x_tile, there, other=0.0).to(tl.float32)
            grad_step = grad_d[TILE - 1 - t] * 0.6931471805599453 + value * grad_u[TILE - 1 - t]
            if SOFTPLUS:
                raw = tl.load(dt_tile, there, other=0.0).to(tl.float32)
                if bias is not None:
                    raw += bias
                grad_step *= _sigmoid(raw)
            grad_step = tl.where(there, grad_step, 0.0)
            grad_bias += grad_step
            grad_skip += pulled[t] * value
            tl.store(grad_x_tile, d[t] * grad_u[TILE - 1 - t] + skip * pulled[t], there)
            tl.store(grad_dt_tile, grad_step, there)
            if z is not None:
                z_tile -= z_token
                grad_z_tile -= grad_z_token
                grad = tl.load(grad_tile, there, other=0.0).to(tl.float32)
                gate = tl.load(z_tile, there, other=0.0).to(tl.float32)
                opened = _sigmoid(gate)
                grad *= (read[TILE - 1 - t] + skip * value) * (opened * (1.0 + gate * (1.0 - opened)))
                tl.store(grad_z_tile, grad, there)
    tl.store(of_chunks + DSTATE * DIM, grad_skip, in_dim)
    tl.store(of_chunks + (DSTATE + 1) * DIM, grad_bias, in_dim)
