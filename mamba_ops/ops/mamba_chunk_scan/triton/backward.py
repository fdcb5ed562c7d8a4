"""The gradients of the Mamba-2 recurrence, chunk by chunk: what comes before all chunks are there at once.

`_step_sizes` finds what every token keeps of its chunk's past, and its chunk's end of it. `_carry` walks over the
chunks of a row in both directions at once, with one head's state in registers, then with that state's gradient.
Decays of any strength are exact, by the sums of `ops/_triton/decay.py`.
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
    steps,  # out: (chunks, heads, 7, CHUNK), described where they are stored
    dt_stride,
    length,  # tokens of every row; with cu_seqlens, of all rows
    rows,
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

    # Of every token: dt; the decay since the chunk began, and to its end; log2 of the former, rounded, and what that
    # leaves out as two factors; dt times the latter. Places past the chunk's last token have a dt of 0.
    steps += (tl.program_id(0).to(tl.int64) * HEADS + head)[None, :] * (7 * CHUNK) + tl.arange(0, CHUNK)[:, None]
    tl.store(steps, d, in_head[None, :])
    tl.store(steps + CHUNK, tl.exp2(to_log2(total)), in_head[None, :])
    tl.store(steps + 2 * CHUNK, tl.exp2(to_log2(left)), in_head[None, :])
    tl.store(steps + 3 * CHUNK, near, in_head[None, :])
    tl.store(steps + 4 * CHUNK, up, in_head[None, :])
    tl.store(steps + 5 * CHUNK, down, in_head[None, :])
    tl.store(steps + 6 * CHUNK, down * d, in_head[None, :])


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
    place = tl.arange(0, CHUNK)
    s = tl.zeros([BLOCK_DIM, BLOCK_STATE], tl.float32)
    if tl.program_id(1) == 0:
        x += head * DIM
        B += head // (HEADS // GROUPS) * DSTATE
        if initial is not None:
            s += tl.load(initial + of_row, in_state, other=0.0).to(tl.float32)
        for number in range(chunks):
            low = begin + number * CHUNK
            high = tl.minimum(low + CHUNK, begin + count)
            token = low + place
            inside = token < high
            at = ((first + number).to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state
            tl.store(starts + at, s, in_state)
            sizes = steps + ((first + number).to(tl.int64) * HEADS + head) * (7 * CHUNK)
            s *= tl.load(sizes + 2 * CHUNK - 1)
            w = tl.load(sizes + 2 * CHUNK + place) * tl.load(sizes + place)
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
            token = low + place
            inside = token < high
            of_tokens = inside[:, None] & in_dim[None, :]
            at = ((first + number).to(tl.int64) * HEADS + head) * (DIM * DSTATE) + of_state
            tl.store(ends + at, s, in_state)
            sizes = steps + ((first + number).to(tl.int64) * HEADS + head) * (7 * CHUNK)
            s *= tl.load(sizes + 2 * CHUNK - 1)
            w = tl.load(sizes + CHUNK + place)
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
