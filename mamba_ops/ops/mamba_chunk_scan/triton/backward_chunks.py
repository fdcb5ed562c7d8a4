"""The gradients of the Mamba-2 recurrence, of all chunks at once, given the states at their ends.

A program walks over some heads of a group, which share B and C. `_of_groups` sums over them what the gradients of B and
C are made of, before it is multiplied; `_of_heads` finds the gradients that each head has to itself. Sums over programs
come after, in a fixed order.

The gradient of a step's decay adds only what reaches past that step, and never takes one sum from another: it is right
where a token forgets everything before it.
"""

import triton
import triton.language as tl

from mamba_ops.ops._triton.common import chunk_bounds, kernel, softplus, tile_ptrs
from mamba_ops.ops._triton.decay import finite_rate, sums_from


@triton.jit
def _through_gate(grad, gate):
    # The gradient of what the gate multiplies, given that of the gated.
    gate = gate.to(tl.float32)
    return grad.to(tl.float32) * gate * tl.sigmoid(gate)


@kernel(first_number="x_stride", static="steps starts ends of_B of_C found met")
def _of_groups(
    x,
    B,
    C,
    z,
    grad,
    cu_seqlens,
    steps,
    starts,
    ends,
    of_B,  # out: this and the next: (splits, tokens, groups, dstate)
    of_C,
    found,  # out: (chunks, heads, 4, CHUNK): its first, what a token reads of the state before the chunk
    met,  # out: (chunks, heads), what that state counts at the chunk's end
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
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    # Three programs have the same tokens and heads: for C, for B, and for what is read of states.
    PER_SPLIT: tl.constexpr = HEADS // (GROUPS * SPLITS)
    program = tl.program_id(0) // 3
    chunk = program // (SPLITS * GROUPS)
    group = program // SPLITS % GROUPS
    split = program % SPLITS
    _, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if low >= high:  # there can be fewer chunks than programs
        return
    channel = tl.arange(0, BLOCK_DIM)
    entry = tl.arange(0, BLOCK_STATE)
    in_dim = channel < DIM
    in_dstate = entry < DSTATE
    place = tl.arange(0, CHUNK)
    token = low + place
    inside = token < high
    of_tokens = inside[:, None] & in_dim[None, :]
    of_entries = inside[:, None] & in_dstate[None, :]
    of_state = channel[:, None] * DSTATE + entry[None, :]
    in_state = in_dim[:, None] & in_dstate[None, :]

    operand = starts.dtype.element_ty
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)  # gradients of the products of C and B, or of B and C
    total = tl.zeros([CHUNK, BLOCK_STATE], tl.float32)
    at_out = (split.to(tl.int64) * tokens + token)[:, None] * (GROUPS * DSTATE) + (group * DSTATE + entry)[None, :]
    if tl.program_id(0) % 3 == 0:
        reaches = place[:, None] >= place[None, :]
        for index in range(PER_SPLIT):
            head = (group * SPLITS + split) * PER_SPLIT + index
            sizes = steps + (chunk.to(tl.int64) * HEADS + head) * (7 * CHUNK) + place
            since = tl.load(sizes + CHUNK)
            near = tl.load(sizes + 3 * CHUNK)
            up = tl.load(sizes + 4 * CHUNK)
            read = tl.load(sizes + 6 * CHUNK)
            u = tl.load(tile_ptrs(x + head * DIM, token, x_stride, channel, ALIGNED), of_tokens, other=0.0).to(operand)
            g = tl.load(tile_ptrs(grad + head * DIM, token, grad_stride, channel, ALIGNED), of_tokens, other=0.0)
            if z is not None:
                gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), of_tokens, other=0.0)
                g = _through_gate(g, gate)
            state = tl.load(
                starts + (chunk.to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state, in_state, other=0.0
            )
            decay = near[:, None] - near[None, :]
            decay = tl.exp2(tl.where(reaches, decay, float("-inf")))
            pairs += (
                tl.dot(g.to(operand), tl.trans(u), input_precision=PRECISION) * decay * (up[:, None] * read[None, :])
            )
            g = (g.to(tl.float32) * since[:, None]).to(operand)
            total = tl.dot(g, state, total, input_precision=PRECISION)
        other = tl.load(tile_ptrs(B + group * DSTATE, token, B_stride, entry, ALIGNED), of_entries, other=0.0)
        total = tl.dot(pairs.to(operand), other.to(operand), total, input_precision=PRECISION)
        tl.store(of_C + at_out, total, of_entries)
    elif tl.program_id(0) % 3 == 1:
        reaches = place[None, :] >= place[:, None]
        for index in range(PER_SPLIT):
            head = (group * SPLITS + split) * PER_SPLIT + index
            sizes = steps + (chunk.to(tl.int64) * HEADS + head) * (7 * CHUNK) + place
            until = tl.load(sizes + 2 * CHUNK) * tl.load(sizes)
            near = tl.load(sizes + 3 * CHUNK)
            up = tl.load(sizes + 4 * CHUNK)
            read = tl.load(sizes + 6 * CHUNK)
            u = tl.load(tile_ptrs(x + head * DIM, token, x_stride, channel, ALIGNED), of_tokens, other=0.0).to(operand)
            g = tl.load(tile_ptrs(grad + head * DIM, token, grad_stride, channel, ALIGNED), of_tokens, other=0.0)
            if z is not None:
                gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), of_tokens, other=0.0)
                g = _through_gate(g, gate)
            state = tl.load(ends + (chunk.to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state, in_state, other=0.0)
            decay = near[None, :] - near[:, None]
            decay = tl.exp2(tl.where(reaches, decay, float("-inf")))
            pairs += (
                tl.dot(u, tl.trans(g.to(operand)), input_precision=PRECISION) * decay * (up[None, :] * read[:, None])
            )
            u = (u.to(tl.float32) * until[:, None]).to(operand)
            total = tl.dot(u, state, total, input_precision=PRECISION)
        other = tl.load(tile_ptrs(C + group * DSTATE, token, C_stride, entry, ALIGNED), of_entries, other=0.0)
        total = tl.dot(pairs.to(operand), other.to(operand), total, input_precision=PRECISION)
        tl.store(of_B + at_out, total, of_entries)
    else:
        c = tl.load(tile_ptrs(C + group * DSTATE, token, C_stride, entry, ALIGNED), of_entries, other=0.0).to(operand)
        for index in tl.range(0, PER_SPLIT, num_stages=2):  # reading no further ahead, as two states are large
            head = (group * SPLITS + split) * PER_SPLIT + index
            of_head = chunk.to(tl.int64) * HEADS + head
            g = tl.load(tile_ptrs(grad + head * DIM, token, grad_stride, channel, ALIGNED), of_tokens, other=0.0)
            if z is not None:
                gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), of_tokens, other=0.0)
                g = _through_gate(g, gate)
            start = tl.load(starts + of_head * (DIM * DSTATE) + of_state, in_state, other=0.0)
            end = tl.load(ends + of_head * (DIM * DSTATE) + of_state, in_state, other=0.0)
            read = tl.sum(tl.dot(c, tl.trans(start), input_precision=PRECISION) * g.to(tl.float32), 1)
            since = tl.load(steps + of_head * (7 * CHUNK) + CHUNK + place)
            tl.store(found + of_head * (4 * CHUNK) + place, read * since)
            # What two states have in common, by matrix units: of a product, its diagonal.
            meet = tl.dot(start, tl.trans(end), input_precision=PRECISION)
            meet = tl.where(channel[:, None] == channel[None, :], meet, 0.0)
            tl.store(met + of_head, tl.sum(meet))


@triton.jit
def _read_state(
    whole,  # the vectors, where PART is all of their entries
    vectors,
    token,
    inside,
    stride,
    state,
    channel,
    in_dim,
    DSTATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    PART: tl.constexpr,
):
    # What vectors of tokens, B or C, read of a state (dim, dstate), PART entries at a time: where a product is made of
    # several, whole operands are more than a thread's registers hold.
    total = tl.zeros([token.shape[0], channel.shape[0]], tl.float32)
    for first in range(0, BLOCK_STATE, PART):
        entry = first + tl.arange(0, PART)
        in_dstate = entry < DSTATE
        of_state = channel[:, None] * DSTATE + entry[None, :]
        s = tl.load(state + of_state, in_dim[:, None] & in_dstate[None, :], other=0.0)
        if PART == BLOCK_STATE:
            v = whole
        else:
            ptrs = tile_ptrs(vectors, token, stride, entry, ALIGNED)
            v = tl.load(ptrs, inside[:, None] & in_dstate[None, :], other=0.0).to(s.dtype)
        total = tl.dot(v, tl.trans(s), total, input_precision=PRECISION)
    return total


@kernel(first_number="x_stride", static="steps starts ends grad_x grad_z found of_D")
def _of_heads(
    x,
    B,
    C,
    D,
    z,
    grad,
    cu_seqlens,
    steps,
    starts,
    ends,
    grad_x,  # out: this and the next are dense
    grad_z,
    found,  # out: (chunks, heads, 4, CHUNK): all but the first, described where they are stored
    of_D,  # out: (chunks, heads, dim), where D is so
    x_stride,  # this and the next four: from token to token
    B_stride,
    C_stride,
    grad_stride,
    z_stride,
    length,
    rows,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    PART: tl.constexpr,  # entries of a state that are multiplied at once
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
    in_dim = channel < DIM
    place = tl.arange(0, CHUNK)
    token = low + place
    inside = token < high
    of_tokens = inside[:, None] & in_dim[None, :]

    # Matrices of pairs of tokens have the one that is read first.
    operand = starts.dtype.element_ty
    B += group * DSTATE
    C += group * DSTATE
    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    for first in tl.static_range(0, BLOCK_STATE, PART):
        entry = first + tl.arange(0, PART)
        of_entries = inside[:, None] & (entry < DSTATE)[None, :]
        b = tl.load(tile_ptrs(B, token, B_stride, entry, ALIGNED), of_entries, other=0.0).to(operand)
        c = tl.load(tile_ptrs(C, token, C_stride, entry, ALIGNED), of_entries, other=0.0).to(operand)
        products = tl.dot(b, tl.trans(c), products, input_precision=PRECISION)
    products = tl.where(place[None, :] >= place[:, None], products, 0.0)

    for index in range(PER_SPLIT):
        head = (group * SPLITS + split) * PER_SPLIT + index
        of_head = chunk.to(tl.int64) * HEADS + head
        sizes = steps + of_head * (7 * CHUNK) + place
        u = tl.load(tile_ptrs(x + head * DIM, token, x_stride, channel, ALIGNED), of_tokens, other=0.0).to(operand)
        g = tl.load(tile_ptrs(grad + head * DIM, token, grad_stride, channel, ALIGNED), of_tokens, other=0.0)
        d = tl.load(sizes)
        near = tl.load(sizes + 3 * CHUNK)
        skip = tl.zeros([BLOCK_DIM], tl.float32)
        if D is not None:
            if D_PER_CHANNEL:
                skip = tl.load(D + head * DIM + channel, in_dim, other=0.0).to(tl.float32)
            else:
                skip += tl.load(D + head).to(tl.float32)

        # How much of a token the later ones read, by its size.
        weights = tl.exp2(tl.minimum(near[None, :] - near[:, None], 0.0)) * products
        weights *= tl.load(sizes + 4 * CHUNK)[None, :] * tl.load(sizes + 5 * CHUNK)[:, None]
        out_ptrs = token.to(tl.int64)[:, None] * (HEADS * DIM) + (head * DIM + channel)[None, :]
        if z is not None:
            start = starts + of_head * (DIM * DSTATE)
            y = _read_state(
                c, C, token, inside, C_stride, start, channel, in_dim, DSTATE, ALIGNED, PRECISION, BLOCK_STATE, PART
            )
            y *= tl.load(sizes + CHUNK)[:, None]
            y = tl.dot(tl.trans((weights * d[:, None]).to(operand)), u, y, input_precision=PRECISION)
            y += u.to(tl.float32) * skip[None, :]
            gate = tl.load(tile_ptrs(z + head * DIM, token, z_stride, channel, ALIGNED), of_tokens, other=0.0)
            gate = gate.to(tl.float32)
            opened = tl.sigmoid(gate)
            g = g.to(tl.float32)
            tl.store(grad_z + out_ptrs, g * y * opened * (1.0 + gate * (1.0 - opened)), of_tokens)
            g *= gate * opened
        exact = g.to(tl.float32)
        g = g.to(operand)
        wide = u.to(tl.float32)

        # Of every token: what later tokens, from each one on, read of those before that one, and what the chunk's end
        # keeps of these; how much x counts, by way of states and of D.
        out = found + of_head * (4 * CHUNK) + place
        is_same = place[None, :] == place[:, None]
        end = ends + of_head * (DIM * DSTATE)
        kept = _read_state(
            b, B, token, inside, B_stride, end, channel, in_dim, DSTATE, ALIGNED, PRECISION, BLOCK_STATE, PART
        )
        kept *= tl.load(sizes + 2 * CHUNK)[:, None]
        pairs = tl.dot(u, tl.trans(g), input_precision=PRECISION)
        tl.store(out + 3 * CHUNK, tl.sum(tl.where(is_same, pairs, 0.0), 1))
        grad_u = tl.dot(weights.to(operand), g, kept, input_precision=PRECISION)
        tl.store(grad_x + out_ptrs, grad_u * d[:, None] + exact * skip[None, :], of_tokens)
        tl.store(out + 2 * CHUNK, tl.sum(wide * grad_u, 1))
        if D_PER_CHANNEL:
            tl.store(of_D + of_head * DIM + channel, tl.sum(exact * wide, 0), in_dim)
        later = sums_from(pairs * weights * d[:, None], operand, PRECISION)
        later += (tl.sum(kept * wide, 1) * d)[:, None]
        tl.store(out + CHUNK, tl.sum(tl.where(place[None, :] > place[:, None], later, 0.0), 0))


@kernel(first_number="dt_stride", static="steps found met grad_dt shares of_D")
def _of_steps(
    dt,
    A,
    dt_bias,
    cu_seqlens,
    steps,
    found,
    met,
    grad_dt,  # out: dense
    shares,  # out: (2, chunks, heads): the chunk's share of the gradients of A and dt_bias
    of_D,  # out: (chunks, heads), where D is so
    dt_stride,
    length,
    rows,
    chunks,
    dt_min,
    dt_max,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    D_PER_HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    chunk = tl.program_id(0)
    _, low, high, _, _ = chunk_bounds(chunk, cu_seqlens, rows, length, CHUNK, BLOCK_ROWS)
    if low >= high:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    in_head = (head < HEADS)[None, :]
    place = tl.arange(0, CHUNK)
    token = low + place
    inside = (token < high)[:, None] & in_head
    of_head = (chunk.to(tl.int64) * HEADS + head)[None, :]
    sizes = steps + of_head * (7 * CHUNK) + place[:, None]
    found += of_head * (4 * CHUNK) + place[:, None]

    # The gradient of a decay: of all that passes it.
    reach = tl.cumsum(tl.load(found, in_head, other=0.0), 0, reverse=True) + tl.load(found + CHUNK, in_head, other=0.0)
    whole = tl.load(steps + of_head * (7 * CHUNK) + 2 * CHUNK - 1, in_head, other=0.0)
    reach += whole * tl.load(met + of_head, in_head, other=0.0)
    raw = tl.load(tile_ptrs(dt, token, dt_stride, head, False), inside, other=0.0).to(tl.float32)
    if dt_bias is not None:
        raw += tl.load(dt_bias + head, head < HEADS, other=0.0).to(tl.float32)[None, :]
    unlimited = raw
    if SOFTPLUS:
        unlimited = softplus(raw)
    is_free = inside & (unlimited >= dt_min) & (unlimited <= dt_max)
    rate = finite_rate(tl.load(A + head, head < HEADS, other=0.0).to(tl.float32))[None, :]
    grad_d = tl.where(is_free, tl.load(found + 2 * CHUNK, in_head, other=0.0) + rate * reach, 0.0)
    if SOFTPLUS:
        grad_d *= tl.sigmoid(raw)
    tl.store(grad_dt + token.to(tl.int64)[:, None] * HEADS + head[None, :], grad_d, inside)
    share = chunk.to(tl.int64) * HEADS + head
    tl.store(shares + share, tl.sum(tl.load(sizes, in_head, other=0.0) * reach, 0), head < HEADS)
    tl.store(shares + chunks.to(tl.int64) * HEADS + share, tl.sum(grad_d, 0), head < HEADS)
    if D_PER_HEAD:
        tl.store(of_D + share, tl.sum(tl.load(found + 3 * CHUNK, in_head, other=0.0), 0), head < HEADS)
