"""The backward pass of the selective scan, in chunks of tokens that run side by side: six launches.

`_arrange` lays out B and C, and the rates of decay, as the others read them. `_boundaries` finds what every chunk would
leave if nothing came before it, and the gradient of the state before it if nothing came after it. `_carry` walks over
the chunks of a row, forwards and backwards, and turns these into the state before each chunk and the gradient of the
state after it. `_gradients` then runs every chunk alone, tile by tile from its last one on. What it finds of sums over
tokens it leaves by chunk, what it finds of sums over channels by block of channels: `_sum_chunks` and `_sum_blocks` add
these up, in one order.

A thread has the tokens of a tile in registers, of two channels, and goes through the entries of the state one by one.
"""

# mypy: disable-error-code="assignment,misc,var-annotated"
# Tuples grow in what Triton compiles.
import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel
from mamba_ops.ops.selective_scan.triton.backward_tiles import moved, of_chunk, read_pairs, read_tile, sigmoid


@kernel(first_number="rows", static="rates arranged states sums adjoints")
def _boundaries(
    x,
    dt,
    rates,
    arranged,
    z,
    dt_bias,
    grad_output,
    cu_seqlens,
    states,  # out: (chunks, TILES, dstate, dim), of the chunk's end, then before its other tiles
    sums,  # out: (chunks, TILES, dim), of the step sizes up to there
    adjoints,  # out: (chunks, dstate, dim), of the state before the chunk
    rows,
    length,
    one,  # of which compilers do not know that it is 1
    x_token,
    dt_token,
    z_token,
    grad_token,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk, group, _, channel, in_dim = of_chunk(tl.program_id(0), DIM, GROUPS, BLOCK)
    row, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, TILE * TILES, BLOCK_ROWS)
    if row >= rows:
        return
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, in_dim, other=0.0).to(tl.float32)
    rates += channel
    arranged += (chunk.to(tl.int64) * (TILES * GROUPS) + group) * (DSTATE * 2 * TILE)
    states += chunk.to(tl.int64) * (TILES * DSTATE * DIM) + channel
    sums += chunk.to(tl.int64) * (TILES * DIM) + channel
    adjoints += chunk.to(tl.int64) * (DSTATE * DIM) + channel
    total = tl.zeros([BLOCK], tl.float32)
    tiles = (high - low + TILE - 1) // TILE
    for tile in range(tiles):
        start = low + tile * TILE
        tokens = read_tile(
            x,
            dt,
            z,
            grad_output,
            bias,
            start,
            high,
            channel,
            in_dim,
            x_token,
            dt_token,
            z_token,
            grad_token,
            SOFTPLUS,
            PAIRS,
            TILE,
        )
        d = tokens[:TILE]
        u = tokens[TILE : 2 * TILE]
        pulled = tokens[2 * TILE :]
        later = in_dim & (tile > 0)
        before = states + tile * (DSTATE * DIM)
        slot = tl.where(tile + 1 < tiles, tile + 1, 0)
        end = states + slot * (DSTATE * DIM)
        # What an entry needs is read while the one before it is computed; after the last one, what nobody uses. Two
        # entries are an iteration: the numbers read ahead then change places without being moved.
        of_rate = rates
        of_adjoint = adjoints
        entries = arranged + tile * (GROUPS * DSTATE * 2 * TILE) + tl.arange(0, 32) * (one - 1)
        next_rate = tl.load(of_rate, in_dim, other=0.0)
        next_s = tl.load(before, later, other=0.0)
        next_gained = tl.load(of_adjoint, later, other=0.0)
        next_both = read_pairs(entries, TILE, BLOCK)
        for entry in tl.range(DSTATE, loop_unroll_factor=2):  # noqa: B007 - `_` has another type above
            rate = next_rate
            s = next_s
            gained = next_gained
            both = next_both
            of_rate += DIM
            before += DIM
            entries += 2 * TILE
            next_rate = tl.load(of_rate, in_dim, other=0.0)
            next_s = tl.load(before, later, other=0.0)
            next_gained = tl.load(of_adjoint + DIM, later, other=0.0)
            next_both = read_pairs(entries, TILE, BLOCK)
            decays = ()
            for t in tl.static_range(TILE):
                decays += (tl.exp2(rate * d[t]),)
                s = s * decays[t] + u[t] * both[t]
            gain = tl.zeros([BLOCK], tl.float32)
            for t in tl.static_range(TILE - 1, -1, -1):
                gain = (gain + pulled[t] * both[TILE + t]) * decays[t]
            tl.store(end, s, in_dim)
            tl.store(of_adjoint, gained + tl.exp2(rate * total) * gain, in_dim)
            end += DIM
            of_adjoint += DIM
        for t in tl.static_range(TILE):
            total += d[t]
        tl.store(sums + slot * DIM, total, in_dim)


@triton.jit
def _across(values, BLOCK: tl.constexpr):
    # The sums of neighbors, which a thread has: 32 are left.
    return tl.sum(tl.reshape(values, [32, BLOCK // 32]), axis=1)


@triton.jit
def _swap(values, APART: tl.constexpr):
    # Of 32 numbers, those that are APART in each other's place. Bits cancel, so that an exchange is all that is left.
    bits = tl.reshape(values.to(tl.int32, bitcast=True), [16 // APART, 2, APART])
    return tl.reshape(bits ^ tl.xor_sum(bits, axis=1, keep_dims=True), [32]).to(tl.float32, bitcast=True)


@triton.jit
def _halve(values, APART: tl.constexpr):
    # Half as many tensors of 32: of every two, adds the numbers that are APART, and has the sums of the first tensor
    # where that bit of the place is not set, those of the second where it is. A thread sends what another one adds.
    is_one = tl.arange(0, 32) & APART == 0
    sums = ()
    for pair in tl.static_range(len(values) // 2):
        one = values[2 * pair]
        other = values[2 * pair + 1]
        sums += (tl.where(is_one, one, other) + _swap(tl.where(is_one, other, one), APART),)
    return sums


@kernel(first_number="rows", static="rates arranged states sums adjoints of_chunks of_blocks")
def _gradients(
    x,
    dt,
    rates,
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
    one,  # of which compilers do not know that it is 1
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
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,  # of merging: log2(2 * TILE)
):
    BITS: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    VALUES: tl.constexpr = 2 * TILE  # gradients of B and C in a tile, of one entry
    chunk, group, block, channel, in_dim = of_chunk(tl.program_id(0), DIM, GROUPS, BLOCK)
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
    rates += channel
    states += chunk.to(tl.int64) * (TILES * DSTATE * DIM) + channel
    sums += chunk.to(tl.int64) * (TILES * DIM) + channel
    adjoints += chunk.to(tl.int64) * (DSTATE * DIM) + channel
    grad_skip = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)

    tiles = (high - low + TILE - 1) // TILE
    for number in range(tiles):
        tile = tiles - 1 - number
        start = low + tile * TILE
        tokens = read_tile(
            x,
            dt,
            z,
            grad_output,
            bias,
            start,
            high,
            channel,
            in_dim,
            x_token,
            dt_token,
            z_token,
            grad_token,
            SOFTPLUS,
            PAIRS,
            TILE,
        )
        d = tokens[:TILE]
        u = tokens[TILE : 2 * TILE]
        pulled = tokens[2 * TILE :]
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
        entries = arranged + of_tile + tl.arange(0, 32) * (one - 1)
        place = of_blocks + block * (chunks.to(tl.int64) * (TILES * GROUPS * DSTATE * VALUES))
        place += of_tile + tl.arange(0, VALUES)
        # What an entry needs is read while the one before it is computed; after the last one, what nobody uses.
        of_rate = rates
        of_state = states
        of_before = states + tile * (DSTATE * DIM)
        of_adjoint = adjoints
        of_sum = of_chunks
        next_rate = tl.load(of_rate, in_dim, other=0.0)
        next_s = tl.load(of_state, in_dim, other=0.0)
        next_gained = tl.load(of_before, later, other=0.0)
        next_grad_s = tl.load(of_adjoint, in_dim, other=0.0)
        next_earlier = tl.load(of_sum, in_dim & (number > 0), other=0.0)
        next_both = read_pairs(entries, TILE, BLOCK)
        for entry in tl.range(DSTATE, loop_unroll_factor=2):  # noqa: B007 - `_` has another type above
            rate = next_rate
            s = next_s * tl.exp2(rate * total) + next_gained
            grad_s = next_grad_s
            earlier = next_earlier
            both = next_both
            of_rate += DIM
            of_state += DIM
            of_before += DIM
            entries += VALUES
            next_rate = tl.load(of_rate, in_dim, other=0.0)
            next_s = tl.load(of_state, in_dim, other=0.0)
            next_gained = tl.load(of_before, later, other=0.0)
            next_grad_s = tl.load(of_adjoint + DIM, in_dim, other=0.0)
            next_earlier = tl.load(of_sum + DIM, in_dim & (number > 0), other=0.0)
            next_both = read_pairs(entries, TILE, BLOCK)
            bs = both[:TILE]
            cs = both[TILE:]
            decays = ()
            before = ()
            for t in tl.static_range(TILE):
                decays += (tl.exp2(rate * d[t]),)
                before += (s,)
                s = s * decays[t] + u[t] * bs[t]

            # Always. What is read above has no use before the next entry, so compilers would ask for it last; into
            # this block they do not move it.
            if length > 0:
                grad_rate = tl.zeros([BLOCK], tl.float32)
                grad_u_after = ()
                grad_d_after = ()
                read_after = ()
                merged = ()
                for t in tl.static_range(TILE - 1, -1, -1):
                    grad_s += pulled[t] * cs[t]
                    grad_u_after += (grad_u[TILE - 1 - t] + grad_s * bs[t],)
                    read_after += (read[TILE - 1 - t] + s * cs[t],)
                    merged = _halve((_across(u[t] * grad_s, BLOCK), _across(pulled[t] * s, BLOCK)), 1) + merged
                    grad_s *= decays[t]
                    s = before[t]
                    grad_exponent = grad_s * s
                    grad_d_after += (grad_d[TILE - 1 - t] + grad_exponent * rate,)
                    grad_rate += grad_exponent * d[t]
                grad_u = grad_u_after
                grad_d = grad_d_after
                read = read_after
                for level in tl.static_range(1, LEVELS):
                    merged = _halve(merged, 2**level)
                found = tl.sum(tl.reshape(merged[0], [32 // VALUES, VALUES]), axis=0)
                tl.store(place, found)
                tl.store(of_adjoint, grad_s, in_dim)
                tl.store(of_sum, earlier + grad_rate, in_dim)
            place += VALUES
            of_adjoint += DIM
            of_sum += DIM

        values = ()  # this and the next three: from the last token to the first, all read before one is written
        raws = ()
        grads = ()
        gates = ()
        end = start.to(tl.int64) + TILE
        x_tile = moved(x + end * x_token, channel, PAIRS)
        dt_tile = moved(dt + end * dt_token, channel, PAIRS)
        if z is not None:
            grad_tile = moved(grad_output + end * grad_token, channel, PAIRS)
            z_tile = moved(z + end * z_token, channel, PAIRS)
        for t in tl.static_range(TILE - 1, -1, -1):
            there = in_dim & (start + t < high)
            x_tile = moved(x_tile, -x_token, PAIRS)
            values += (tl.load(x_tile, there, other=0.0),)
            if SOFTPLUS:
                dt_tile = moved(dt_tile, -dt_token, PAIRS)
                raws += (tl.load(dt_tile, there, other=0.0),)
            if z is not None:
                grad_tile = moved(grad_tile, -grad_token, PAIRS)
                z_tile = moved(z_tile, -z_token, PAIRS)
                grads += (tl.load(grad_tile, there, other=0.0),)
                gates += (tl.load(z_tile, there, other=0.0),)
        grad_x_tile = moved(grad_x + end * grad_x_token, channel, PAIRS)
        grad_dt_tile = moved(grad_dt + end * grad_dt_token, channel, PAIRS)
        if z is not None:
            grad_z_tile = moved(grad_z + end * grad_z_token, channel, PAIRS)
        for t in tl.static_range(TILE - 1, -1, -1):
            there = in_dim & (start + t < high)
            grad_x_tile = moved(grad_x_tile, -grad_x_token, PAIRS)
            grad_dt_tile = moved(grad_dt_tile, -grad_dt_token, PAIRS)
            value = values[TILE - 1 - t].to(tl.float32)
            grad_step = grad_d[TILE - 1 - t] * 0.6931471805599453 + value * grad_u[TILE - 1 - t]
            if SOFTPLUS:
                raw = raws[TILE - 1 - t].to(tl.float32)
                if bias is not None:
                    raw += bias
                grad_step *= sigmoid(raw, BITS)
            grad_step = tl.where(there, grad_step, 0.0)
            grad_bias += grad_step
            grad_skip += pulled[t] * value
            tl.store(grad_x_tile, d[t] * grad_u[TILE - 1 - t] + skip * pulled[t], there)
            tl.store(grad_dt_tile, grad_step, there)
            if z is not None:
                grad_z_tile = moved(grad_z_tile, -grad_z_token, PAIRS)
                gate = gates[TILE - 1 - t].to(tl.float32)
                opened = sigmoid(gate, BITS)
                grad = grads[TILE - 1 - t].to(tl.float32) * (read[TILE - 1 - t] + skip * value)
                grad *= opened * (1.0 + gate * (1.0 - opened))
                tl.store(grad_z_tile, grad, there)
    tl.store(of_chunks + DSTATE * DIM, grad_skip, in_dim)
    tl.store(of_chunks + (DSTATE + 1) * DIM, grad_bias, in_dim)
