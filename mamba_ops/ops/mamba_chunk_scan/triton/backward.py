"""The gradients of the Mamba-2 recurrence, chunk by chunk, in three launches and sums in a fixed order.

`_step_sizes` finds what every token keeps of its chunk's past, and its chunk's end of it. `_carry` walks over the
chunks of a row in both directions at once, with one head's state in registers, then with that state's gradient.
`_chunks` then has all chunks at once. It walks over some heads of a group, which share B and C: the products that
B's and C's gradients need are summed over them before they are multiplied.

Decays of any strength are exact, by the sums of `ops/_triton/decay.py`. The gradient of a step's decay adds only what
reaches past that step, and never takes one sum from another: it is right where a token forgets everything before it.
"""

import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, row_chunks, softplus, tile_ptrs
from mamba_ops.ops._triton.decay import exact_sums, finite_rate, split, to_log2


@kernel(first_number="dt_stride", static="steps")
def _step_sizes(
    dt,
    A,
    dt_bias,
    cu_seqlens,
    steps,  # out: (6, heads, tokens), described where they are stored
    dt_stride,
    length,  # tokens of every row; with cu_seqlens, of all rows
    rows,
    tokens,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    _, low, high, _, _ = chunk_bounds(tl.program_id(0), cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if low >= high:  # there can be fewer chunks than programs
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_head = head < HEADS
    token = low + tl.arange(0, CHUNK)
    inside = token < high
    stored = inside[:, None] & in_head[None, :]
    d = tl.load(tile_ptrs(dt, token, dt_stride, head, False), stored, other=0.0).to(tl.float32)
    if dt_bias is not None:
        d += tl.load(dt_bias + head, in_head, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        d = softplus(d)
    d = tl.where(stored, tl.minimum(tl.maximum(d, dt_min), dt_max), 0.0)
    rate = tl.load(A + head, in_head, other=0.0).to(tl.float32) * 1.4426950408889634
    log_decay = d * finite_rate(rate)[None, :]
    d = tl.where(log_decay == log_decay, d, log_decay)  # NaN stays NaN
    total, left = exact_sums(log_decay)
    near, up, down = split(total)

    # Planes: dt; the decay since the chunk began, and to its end; log2 of the former, rounded, and what that leaves out
    # as two factors.
    steps += head.to(tl.int64)[None, :] * tokens + token[:, None]
    plane = HEADS * tokens.to(tl.int64)
    tl.store(steps, d, stored)
    tl.store(steps + plane, tl.exp2(to_log2(total)), stored)
    tl.store(steps + 2 * plane, tl.exp2(to_log2(left)), stored)
    tl.store(steps + 3 * plane, near, stored)
    tl.store(steps + 4 * plane, up, stored)
    tl.store(steps + 5 * plane, down, stored)


@kernel(first_number="x_stride", static="initial final steps starts ends grad_initial")
def _carry(
    x,
    B,
    C,
    grad,
    z,
    initial,  # this and the next are dense; None: zeros
    final,
    cu_seqlens,
    steps,
    starts,  # out: (chunks, heads, dim, dstate), the state before a chunk
    ends,  # out: the same, the gradient of the state after it
    grad_initial,
    x_stride,  # this and the next four: from token to token
    B_stride,
    C_stride,
    grad_stride,
    z_stride,
    length,
    rows,
    tokens,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    # Programs that run together read the same tokens: rows are outermost, then heads.
    DIM_BLOCKS: tl.constexpr = (DIM + BLOCK_DIM - 1) // BLOCK_DIM
    BLOCKS: tl.constexpr = DIM_BLOCKS * ((DSTATE + BLOCK_STATE - 1) // BLOCK_STATE)
    program = tl.program_id(0)
    row = program // (BLOCKS * HEADS)
    head = program // BLOCKS % HEADS
    channel = program % DIM_BLOCKS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    entry = program % BLOCKS // DIM_BLOCKS * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    in_state = in_dim[:, None] & in_dstate[None, :]
    of_state = channel[:, None] * DSTATE + entry[None, :]
    of_row = (row.to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state
    first, chunks, begin, count = row_chunks(row, rows, cu_seqlens, length, CHUNK, BLOCK_ROWS)

    operand = starts.dtype.element_ty
    sizes = steps + head.to(tl.int64) * tokens
    plane = HEADS * tokens.to(tl.int64)
    s = tl.zeros([BLOCK_DIM, BLOCK_STATE], tl.float32)
    if tl.program_id(1) == 0:
        x += head * DIM
        B += head // (HEADS // GROUPS) * DSTATE
        if initial is not None:
            s += tl.load(initial + of_row, in_state, other=0.0).to(tl.float32)
        for number in range(chunks):
            low = begin + number * CHUNK
            high = tl.minimum(low + CHUNK, begin + count)
            token = low + tl.arange(0, CHUNK)
            inside = token < high
            at = ((first + number).to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state
            tl.store(starts + at, s, in_state)
            s *= tl.load(sizes + plane + high - 1)
            w = tl.load(sizes + 2 * plane + token, inside, other=0.0) * tl.load(sizes + token, inside, other=0.0)
            u = tl.load(tile_ptrs(x, token, x_stride, channel, ALIGNED), inside[:, None] & in_dim[None, :], other=0.0)
            b_ptrs = tile_ptrs(B, token, B_stride, entry, ALIGNED)
            b = tl.load(b_ptrs, inside[:, None] & in_dstate[None, :], other=0.0).to(tl.float32) * w[:, None]
            s = tl.dot(tl.trans(u.to(operand)), b.to(operand), s, input_precision="ieee")
    else:
        grad += head * DIM
        C += head // (HEADS // GROUPS) * DSTATE
        if final is not None:
            s += tl.load(final + of_row, in_state, other=0.0).to(tl.float32)
        for back in range(chunks):
            number = chunks - 1 - back
            low = begin + number * CHUNK
            high = tl.minimum(low + CHUNK, begin + count)
            token = low + tl.arange(0, CHUNK)
            inside = token < high
            of_tokens = inside[:, None] & in_dim[None, :]
            at = ((first + number).to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state
            tl.store(ends + at, s, in_state)
            s *= tl.load(sizes + plane + high - 1)
            w = tl.load(sizes + plane + token, inside, other=0.0)
            g = tl.load(tile_ptrs(grad, token, grad_stride, channel, ALIGNED), of_tokens, other=0.0)
            if z is not None:
                gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), of_tokens, other=0.0)
                gate = gate.to(tl.float32)
                g = g.to(tl.float32) * gate * tl.sigmoid(gate)
            c_ptrs = tile_ptrs(C, token, C_stride, entry, ALIGNED)
            c = tl.load(c_ptrs, inside[:, None] & in_dstate[None, :], other=0.0).to(tl.float32) * w[:, None]
            s = tl.dot(tl.trans(g.to(operand)), c.to(operand), s, input_precision="ieee")
        if grad_initial is not None:
            tl.store(grad_initial + of_row, s, in_state)


@kernel(first_number="x_stride", static="steps starts ends grad_x grad_dt grad_z shares of_B of_C of_D")
def _chunks(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    grad,
    cu_seqlens,
    steps,
    starts,
    ends,
    grad_x,  # out: this and the next two are dense
    grad_dt,
    grad_z,
    shares,  # out: (2, chunks, heads): the chunk's share of the gradients of A and dt_bias
    of_D,  # out: (chunks, heads, dim), or (chunks, heads) where D is
    of_B,  # out: this and the next: (splits, tokens, groups, dstate)
    of_C,
    x_stride,  # this and the next five: from token to token
    dt_stride,
    B_stride,
    C_stride,
    grad_stride,
    z_stride,
    length,
    rows,
    tokens,
    chunks,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    PER_SPLIT: tl.constexpr = HEADS // (GROUPS * SPLITS)
    program = tl.program_id(0)
    chunk = program // (SPLITS * GROUPS)
    group = program // SPLITS % GROUPS
    split = program % SPLITS
    _, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if low >= high:
        return
    channel = tl.arange(0, BLOCK_DIM)
    entry = tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    of_state = channel[:, None] * DSTATE + entry[None, :]
    in_state = in_dim[:, None] & in_dstate[None, :]
    place = tl.arange(0, CHUNK)
    token = low + place
    inside = token < high
    of_tokens = inside[:, None] & in_dim[None, :]
    of_entries = inside[:, None] & in_dstate[None, :]
    is_later = place[:, None] > place[None, :]

    operand = starts.dtype.element_ty
    b = tl.load(tile_ptrs(B + group * DSTATE, token, B_stride, entry, ALIGNED), of_entries, other=0.0).to(operand)
    c = tl.load(tile_ptrs(C + group * DSTATE, token, C_stride, entry, ALIGNED), of_entries, other=0.0).to(operand)
    products = tl.dot(c, tl.trans(b), input_precision=PRECISION)
    grad_products = tl.zeros([CHUNK, CHUNK], tl.float32)
    grad_b = tl.zeros([CHUNK, BLOCK_STATE], tl.float32)
    grad_c = tl.zeros([CHUNK, BLOCK_STATE], tl.float32)
    plane = HEADS * tokens.to(tl.int64)

    for index in range(PER_SPLIT):
        head = (group * SPLITS + split) * PER_SPLIT + index
        sizes = steps + head.to(tl.int64) * tokens + token
        rate = finite_rate(tl.load(A + head).to(tl.float32))
        d = tl.load(sizes, inside, other=0.0)
        since = tl.load(sizes + plane, inside, other=0.0)
        until = tl.load(sizes + 2 * plane, inside, other=0.0)
        near = tl.load(sizes + 3 * plane, inside, other=float("-inf"))
        up = tl.load(sizes + 4 * plane, inside, other=0.0)
        down = tl.load(sizes + 5 * plane, inside, other=0.0)
        whole = tl.load(steps + head.to(tl.int64) * tokens + plane + high - 1)
        decay = tl.where(
            place[:, None] >= place[None, :], near[:, None] - tl.where(inside, near, 0.0)[None, :], float("-inf")
        )
        decay = tl.exp2(decay) * up[:, None] * down[None, :]

        u = tl.load(tile_ptrs(x + head * DIM, token, x_stride, channel, ALIGNED), of_tokens, other=0.0).to(operand)
        g = tl.load(tile_ptrs(grad + head * DIM, token, grad_stride, channel, ALIGNED), of_tokens, other=0.0)
        at = (chunk.to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state
        start = tl.load(starts + at, in_state, other=0.0)
        end = tl.load(ends + at, in_state, other=0.0)
        skip = tl.zeros([BLOCK_DIM], tl.float32)
        if D is not None:
            if D_PER_CHANNEL:
                skip = tl.load(D + head * DIM + channel, in_dim, other=0.0).to(tl.float32)
            else:
                skip += tl.load(D + head).to(tl.float32)

        out_ptrs = token.to(tl.int64)[:, None] * (HEADS * DIM) + (head * DIM + channel)[None, :]
        y = tl.dot(c, tl.trans(start), input_precision=PRECISION) * since[:, None]
        read = y
        if z is not None:
            gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), of_tokens, other=0.0)
            gate = gate.to(tl.float32)
            opened = tl.sigmoid(gate)
            y = tl.dot((decay * products * d[None, :]).to(operand), u, y, input_precision=PRECISION)
            y += u.to(tl.float32) * skip[None, :]
            g = g.to(tl.float32)
            tl.store(grad_z + out_ptrs, g * y * opened * (1.0 + gate * (1.0 - opened)), of_tokens)
            g *= gate * opened
        exact = g.to(tl.float32)
        g = g.to(operand)

        # The gradient of a token's decay: first of what it and later tokens read of the state before the chunk, and of
        # that state at the chunk's end.
        reach = tl.cumsum(tl.sum(read * exact, 1), 0, reverse=True)
        reach += whole * tl.sum(tl.sum(start.to(tl.float32) * end.to(tl.float32), 1), 0)
        grad_c = tl.dot((exact * since[:, None]).to(operand), start, grad_c, input_precision=PRECISION)
        wide = u.to(tl.float32)
        grad_b = tl.dot((wide * (until * d)[:, None]).to(operand), end, grad_b, input_precision=PRECISION)

        # What the chunk's end keeps of the tokens, and what they read of each other.
        grad_u = tl.dot(b, tl.trans(end), input_precision=PRECISION) * until[:, None]
        kept = tl.sum(grad_u * wide, 1) * d
        grad_u = tl.dot(tl.trans((decay * products).to(operand)), g, grad_u, input_precision=PRECISION)
        pairs = tl.dot(g, tl.trans(u), input_precision=PRECISION) * decay * d[None, :]
        grad_products += pairs
        between = tl.cumsum(tl.where(is_later, pairs * products, 0.0), 0, reverse=True) + kept[None, :]
        reach += tl.sum(tl.where(is_later, between, 0.0), 1)

        tl.store(grad_x + out_ptrs, grad_u * d[:, None] + exact * skip[None, :], of_tokens)
        raw = tl.load(dt + token.to(tl.int64) * dt_stride + head, inside, other=0.0).to(tl.float32)
        if dt_bias is not None:
            raw += tl.load(dt_bias + head).to(tl.float32)
        unlimited = raw
        if SOFTPLUS:
            unlimited = softplus(raw)
        is_free = inside & (unlimited >= dt_min) & (unlimited <= dt_max)
        grad_d = tl.where(is_free, tl.sum(wide * grad_u, 1) + rate * reach, 0.0)
        if SOFTPLUS:
            grad_d *= tl.sigmoid(raw)
        tl.store(grad_dt + token.to(tl.int64) * HEADS + head, grad_d, inside)
        share = chunk * HEADS + head
        tl.store(shares + share, tl.sum(d * reach, 0))
        tl.store(shares + chunks * HEADS + share, tl.sum(grad_d, 0))
        if D is not None:
            of_channels = tl.sum(exact * wide, 0)
            if D_PER_CHANNEL:
                tl.store(of_D + share * DIM + channel, of_channels, in_dim)
            else:
                tl.store(of_D + share, tl.sum(of_channels, 0))

    grad_products = grad_products.to(operand)
    grad_b = tl.dot(tl.trans(grad_products), c, grad_b, input_precision=PRECISION)
    grad_c = tl.dot(grad_products, b, grad_c, input_precision=PRECISION)
    at = (split.to(tl.int64) * tokens + token)[:, None] * (GROUPS * DSTATE) + (group * DSTATE + entry)[None, :]
    tl.store(of_B + at, grad_b, of_entries)
    tl.store(of_C + at, grad_c, of_entries)
