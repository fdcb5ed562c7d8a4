"""The Mamba-1 recurrence over whole sequences, in chunks of tokens that run side by side: three launches, or one.

`_ends` finds what every chunk but a row's last would leave if nothing came before it. `_starts` walks over the chunks
of a row and turns that into the state before each of them. `_outputs` then runs every chunk from its state. Rows of one
chunk need the last one alone, and give the same bits either way.

A thread has some channels, with all their state in registers: nothing is exchanged between threads, and channels that
lie together in memory are read together. For that, Triton must not know which numbers of A or of a state lie together,
or it would give the numbers of one channel to several threads: hence `one`, and strides where constants would do.
Triton 3.7 then does so; 3.6 still spreads a channel's state over several threads, and is slower for it.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.kernels.triton.common import chunk_at, chunks_of, dense, on_device_of, softplus

CHUNK = 64  # tokens, counted from a row's first one

# What varies from call to call: Triton would compile anew for some values.
_NUMBERS = """rows length null_slot one A_channel A_entry slots_stride write_stride slot_stride dim_stride dstate_stride
    block_size
    u_token delta_token z_token output_token B_token C_token u_row delta_row z_row output_row B_row C_row
    u_channel delta_channel z_channel output_channel B_group C_group B_entry C_entry""".split()
_POINTERS = """u delta A B C D z delta_bias output ssm_state slots write_slots has_initial_state cu_seqlens
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
    source = row.to(tl.int64)
    if slots is not None:
        slots += row.to(tl.int64) * slots_stride
        if initial_block is not None:
            slots += tl.load(initial_block + row)
        source = tl.load(slots).to(tl.int64)
        source = tl.where((source < 0) | (source == null_slot), -1, source)
    return source


@triton.jit
def _pointers(
    tensor, row, token, row_stride, token_stride, base, base_stride, lane, lane_stride, STRIDED: tl.constexpr
):
    # to the numbers `lane` of one token
    tensor += token.to(tl.int64) * token_stride
    if base is not None:
        tensor += base * base_stride
    if STRIDED:
        return tensor + row.to(tl.int64) * row_stride + lane.to(tl.int64) * lane_stride
    return tensor + lane


@triton.jit
def _step_size(d, bias, there, SOFTPLUS: tl.constexpr):
    if bias is not None:
        d += bias
    if SOFTPLUS:
        d = softplus(d)
    return tl.where(there, d, 0.0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _ends(
    u,
    delta,
    A,
    B,
    delta_bias,
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
    u_token,
    delta_token,
    B_token,
    u_row,
    delta_row,
    B_row,
    u_channel,
    delta_channel,
    B_group,
    B_entry,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STRIDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
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
    entry = tl.arange(0, WIDTH)
    in_dstate = entry < DSTATE
    in_state = in_dstate[:, None] & in_dim[None, :]

    row, low, high, _, is_last = _chunk(chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS)
    if (row >= rows) | is_last:
        return
    if _source(row, slots, initial_block, slots_stride, null_slot) < 0:
        return
    rate = tl.load(A + channel[None, :] * A_channel + entry[:, None] * A_entry, in_state, other=0.0).to(tl.float32)
    rate *= 1.4426950408889634
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + channel, in_dim, other=0.0).to(tl.float32)

    u = _pointers(u, row, low, u_row, u_token, None, None, channel, u_channel, STRIDED)
    delta = _pointers(delta, row, low, delta_row, delta_token, None, None, channel, delta_channel, STRIDED)
    B = _pointers(B, row, low, B_row, B_token, group, B_group, entry, B_entry, STRIDED)
    s = tl.zeros([WIDTH, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    some = low < high
    x = tl.load(u, in_dim & some, other=0.0)
    d = tl.load(delta, in_dim & some, other=0.0)
    b = tl.load(B, in_dstate & some, other=0.0)
    for t in range(low, high):
        u += u_token
        delta += delta_token
        B += B_token
        there = t + 1 < high  # what comes next is asked for before it is needed
        next_x = tl.load(u, in_dim & there, other=0.0)
        next_d = tl.load(delta, in_dim & there, other=0.0)
        next_b = tl.load(B, in_dstate & there, other=0.0)
        step = _step_size(d.to(tl.float32), bias, in_dim, SOFTPLUS)
        pushed = (step * x.to(tl.float32))[None, :] * b.to(tl.float32)[:, None]
        s = s * tl.exp2(rate * step[None, :]) + pushed
        total += step
        x = next_x
        d = next_d
        b = next_b
    states += chunk.to(tl.int64) * (DSTATE * DIM)
    tl.store(states + entry[:, None] * DIM + channel[None, :] * one, s, in_state)
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
    rows,
    length,
    null_slot,
    one,
    A_channel,
    A_entry,
    slots_stride,
    write_stride,
    slot_stride,
    dim_stride,
    dstate_stride,
    block_size,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DIM + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // BLOCKS
    channel = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    entry = tl.arange(0, WIDTH)
    in_dim = channel < DIM
    in_state = (entry < DSTATE)[:, None] & in_dim[None, :]

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

    s = tl.zeros([WIDTH, BLOCK], tl.float32)
    if ssm_state is not None:
        of_state = channel.to(tl.int64)[None, :] * dim_stride + entry.to(tl.int64)[:, None] * dstate_stride
    if has_initial_state is not None:
        carried = tl.load(has_initial_state + row) != 0
        s = tl.load(ssm_state + source * slot_stride + of_state, in_state & carried, other=0.0).to(tl.float32)

    if write_slots is not None:
        if count <= 0:  # no token, no chunk: the state moves as it is
            target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = (target != source) & (target >= 0) & (target != null_slot)
            tl.store(ssm_state + target * slot_stride + of_state, s, in_state & stored)

    if states is not None:
        if chunks > 1:
            position = low
            if chunk_ends is not None:
                high = tl.load(chunk_ends + first).to(tl.int32)
                position = tl.load(first_block + row).to(tl.int32) * block_size
                position += tl.maximum(block_size - (high - low), 0)
            rate = tl.load(A + channel[None, :] * A_channel + entry[:, None] * A_entry, in_state, other=0.0).to(
                tl.float32
            )
            rate *= 1.4426950408889634
            place = states + first.to(tl.int64) * (DSTATE * DIM) + entry[:, None] * DIM + channel[None, :] * one
            of_chunk = sums + first.to(tl.int64) * DIM + channel
            left = tl.load(place, in_state, other=0.0)
            total = tl.load(of_chunk, in_dim, other=0.0)
            for number in range(chunks - 1):
                there = number + 2 < chunks
                next_left = tl.load(place + DSTATE * DIM, in_state & there, other=0.0)
                next_total = tl.load(of_chunk + DIM, in_dim & there, other=0.0)
                tl.store(place, s, in_state)
                s = s * tl.exp2(rate * total[None, :]) + left
                if chunk_ends is not None:
                    high = tl.load(chunk_ends + first + number).to(tl.int32)
                    position += high - low
                    low = high
                    column = (position - 1) // block_size
                    target = tl.load(slots + row.to(tl.int64) * slots_stride + column).to(tl.int64)
                    stored = (target >= 0) & (target != null_slot)
                    tl.store(ssm_state + target * slot_stride + of_state, s, in_state & stored)
                left = next_left
                total = next_total
                place += DSTATE * DIM
                of_chunk += DIM
            tl.store(place, s, in_state)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS + _POINTERS)
def _outputs(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
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
    states,  # what chunks begin with
    rows,
    length,
    null_slot,
    one,
    A_channel,
    A_entry,
    slots_stride,
    write_stride,
    slot_stride,
    dim_stride,
    dstate_stride,
    u_token,
    delta_token,
    z_token,
    output_token,
    B_token,
    C_token,
    u_row,
    delta_row,
    z_row,
    output_row,
    B_row,
    C_row,
    u_channel,
    delta_channel,
    z_channel,
    output_channel,
    B_group,
    C_group,
    B_entry,
    C_entry,
    DIM: tl.constexpr,
    DSTATE: tl.constexpr,
    GROUPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STRIDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
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
    entry = tl.arange(0, WIDTH)
    in_dstate = entry < DSTATE
    in_state = in_dstate[:, None] & in_dim[None, :]

    row, low, high, is_first, is_last = _chunk(
        chunk, cu_seqlens, chunk_ends, last_chunk, rows, length, CHUNK, BLOCK_ROWS
    )
    if row >= rows:
        return
    source = _source(row, slots, initial_block, slots_stride, null_slot)
    written = _pointers(output, row, low, output_row, output_token, None, None, channel, output_channel, STRIDED)
    if source < 0:
        for _ in range(low, high):
            tl.store(written, tl.zeros([BLOCK], tl.float32), in_dim)
            written += output_token
        return

    s = tl.zeros([WIDTH, BLOCK], tl.float32)
    if ssm_state is not None:
        of_state = channel.to(tl.int64)[None, :] * dim_stride + entry.to(tl.int64)[:, None] * dstate_stride
    alone = is_first & is_last
    if has_initial_state is not None:
        carried = (tl.load(has_initial_state + row) != 0) & alone
        s = tl.load(ssm_state + source * slot_stride + of_state, in_state & carried, other=0.0).to(tl.float32)
    if states is not None:
        states += chunk.to(tl.int64) * (DSTATE * DIM)
        begun = in_state & (alone == 0)
        s += tl.load(states + entry[:, None] * DIM + channel[None, :] * one, begun, other=0.0)

    rate = tl.load(A + channel[None, :] * A_channel + entry[:, None] * A_entry, in_state, other=0.0).to(tl.float32)
    rate *= 1.4426950408889634
    bias = None
    if delta_bias is not None:
        bias = tl.load(delta_bias + channel, in_dim, other=0.0).to(tl.float32)
    if D is not None:
        skip = tl.load(D + channel, in_dim, other=0.0).to(tl.float32)

    u = _pointers(u, row, low, u_row, u_token, None, None, channel, u_channel, STRIDED)
    delta = _pointers(delta, row, low, delta_row, delta_token, None, None, channel, delta_channel, STRIDED)
    B = _pointers(B, row, low, B_row, B_token, group, B_group, entry, B_entry, STRIDED)
    C = _pointers(C, row, low, C_row, C_token, group, C_group, entry, C_entry, STRIDED)
    some = low < high
    x = tl.load(u, in_dim & some, other=0.0)
    d = tl.load(delta, in_dim & some, other=0.0)
    b = tl.load(B, in_dstate & some, other=0.0)
    c = tl.load(C, in_dstate & some, other=0.0)
    if z is not None:
        z = _pointers(z, row, low, z_row, z_token, None, None, channel, z_channel, STRIDED)
        gate = tl.load(z, in_dim & some, other=0.0)
    for t in range(low, high):
        u += u_token
        delta += delta_token
        B += B_token
        C += C_token
        there = t + 1 < high  # what comes next is asked for before it is needed
        next_x = tl.load(u, in_dim & there, other=0.0)
        next_d = tl.load(delta, in_dim & there, other=0.0)
        next_b = tl.load(B, in_dstate & there, other=0.0)
        next_c = tl.load(C, in_dstate & there, other=0.0)
        if z is not None:
            z += z_token
            next_gate = tl.load(z, in_dim & there, other=0.0)
        step = _step_size(d.to(tl.float32), bias, in_dim, SOFTPLUS)
        pushed = (step * x.to(tl.float32))[None, :] * b.to(tl.float32)[:, None]
        s = s * tl.exp2(rate * step[None, :]) + pushed
        y = tl.sum(s * c.to(tl.float32)[:, None], axis=0)
        if D is not None:
            y += x.to(tl.float32) * skip
        if z is not None:
            gate = gate.to(tl.float32)
            y *= gate * tl.sigmoid(gate)
            gate = next_gate
        tl.store(written, y, in_dim)
        written += output_token
        x = next_x
        d = next_d
        b = next_b
        c = next_c

    if ssm_state is not None:
        if is_last:
            target = source
            if last_block is not None:
                target = tl.load(slots + row.to(tl.int64) * slots_stride + tl.load(last_block + row)).to(tl.int64)
            elif write_slots is not None:
                target = tl.load(write_slots + row.to(tl.int64) * write_stride).to(tl.int64)
            stored = target >= 0
            if null_slot is not None:
                stored = stored & (target != null_slot)
            tl.store(ssm_state + target * slot_stride + of_state, s, in_state & stored)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    ssm_state: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    has_initial_state: Tensor | None,
    null_slot: int,
    block_size: int,
    first_block: Tensor | None,
    last_block: Tensor | None,
    initial_block: Tensor | None,
    chunk_ends: Tensor | None,
    last_chunk: Tensor | None,
    output: Tensor,
) -> None:
    """Write `output` and the last states; shapes and meaning are the op's, and are not checked again.

    Nothing is copied but parameters and index tensors that are not dense. Where the channels of a token do not lie
    together, or the rows of a batch do not follow each other, addresses are computed from more strides, and reading is
    slower.
    """
    rows = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    length = u.shape[1] if cu_seqlens is None else None
    (dim, dstate), tokens = A.shape, u.numel() // A.shape[0]
    if rows == 0:
        return
    if chunk_ends is not None:
        chunks = chunk_ends.shape[0]
    elif length is not None:
        chunks = rows * triton.cdiv(length, CHUNK)
    else:
        chunks = tokens // CHUNK + rows
    several = chunk_ends is not None or chunks > rows  # a row may have more than one
    moves = write_slots is not None and ssm_state is not None and (length is None or length == 0)

    D, delta_bias = (None if t is None else t.contiguous() for t in (D, delta_bias))
    cu_seqlens, has_initial_state, first_block, last_block, initial_block, chunk_ends, last_chunk = (
        None if t is None else t.contiguous()
        for t in (cu_seqlens, has_initial_state, first_block, last_block, initial_block, chunk_ends, last_chunk)
    )
    slots, write_slots = (None if t is None else dense(t) for t in (slots, write_slots))
    groups = B.shape[-2] if B.dim() > u.dim() else 1
    channels, entries = (u, delta, z, output), (B, C)
    strided = not all(t is None or _is_plain(t, length is not None) for t in (*channels, *entries))

    def at(tensor: Tensor | None) -> tuple[int | None, int | None, int | None]:
        """From token to token; from row to row, beyond a row's tokens; from channel to channel, or entry to entry."""
        if tensor is None:
            return None, None, None
        row, token, *_, last = tensor.stride() if length is not None else (0, *tensor.stride())
        if not strided:
            return token if length != 1 else row, None, None
        return token, row - (length or 0) * token, last

    def group_stride(tensor: Tensor) -> int:
        return tensor.stride(-2) if tensor.dim() > u.dim() else 0

    (u_token, u_row, u_channel), (d_token, d_row, d_channel) = at(u), at(delta)
    (z_token, z_row, z_channel), (o_token, o_row, o_channel) = at(z), at(output)
    (B_token, B_row, B_entry), (C_token, C_row, C_entry) = at(B), at(C)
    slots_stride = None if slots is None else slots.stride(0)
    write_stride = None if write_slots is None else write_slots.stride(0)
    slot_stride, dim_stride, dstate_stride = (None, None, None) if ssm_state is None else ssm_state.stride()
    null = None if slots is None and write_slots is None else null_slot

    width, block, warps = _launch(dim // groups, dstate)
    blocks = groups * triton.cdiv(dim // groups, block)
    sizes = {"DIM": dim, "DSTATE": dstate, "CHUNK": CHUNK, "BLOCK_ROWS": 128, "WIDTH": width}
    sizes_of_tokens = {**sizes, "GROUPS": groups, "SOFTPLUS": delta_softplus, "STRIDED": strided, "BLOCK": block}
    states = sums = None
    with on_device_of(u):
        if several and tokens:
            states = torch.empty(chunks, dstate, dim, dtype=torch.float32, device=u.device)
            sums = torch.empty(chunks, dim, dtype=torch.float32, device=u.device)
            _ends[(chunks * blocks,)](
                u,
                delta,
                A,
                B,
                delta_bias,
                slots,
                cu_seqlens,
                initial_block,
                chunk_ends,
                last_chunk,
                states,
                sums,
                rows,
                length,
                null,
                1,
                *A.stride(),
                slots_stride,
                u_token,
                d_token,
                B_token,
                u_row,
                d_row,
                B_row,
                u_channel,
                d_channel,
                group_stride(B),
                B_entry,
                **sizes_of_tokens,
                num_warps=warps,
            )
        if (several and tokens) or moves:
            starts = min(block, 32)
            _starts[(rows * triton.cdiv(dim, starts),)](
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
                states,
                sums,
                rows,
                length,
                null,
                1,
                *A.stride(),
                slots_stride,
                write_stride,
                slot_stride,
                dim_stride,
                dstate_stride,
                block_size or None,
                **sizes,
                BLOCK=starts,
                num_warps=1,
            )
        if tokens == 0 or chunks == 0:
            return
        _outputs[(chunks * blocks,)](
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
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
            states,
            rows,
            length,
            null,
            1,
            *A.stride(),
            slots_stride,
            write_stride,
            slot_stride,
            dim_stride,
            dstate_stride,
            u_token,
            d_token,
            z_token,
            o_token,
            B_token,
            C_token,
            u_row,
            d_row,
            z_row,
            o_row,
            B_row,
            C_row,
            u_channel,
            d_channel,
            z_channel,
            o_channel,
            group_stride(B),
            group_stride(C),
            B_entry,
            C_entry,
            **sizes_of_tokens,
            num_warps=warps,
        )


def _is_plain(tensor: Tensor, batched: bool) -> bool:
    """Whether a token's channels (or entries) lie together, and the rows of a batch follow each other."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        return False
    if not batched or tensor.shape[0] == 1:
        return True
    row, token = tensor.stride()[:2]
    return tensor.shape[1] == 1 or row == tensor.shape[1] * token


@functools.cache
def _launch(dim: int, dstate: int) -> tuple[int, int, int]:
    """WIDTH, BLOCK and warps: a thread has one channel, four warps share B and C."""
    width = triton.next_power_of_2(dstate)
    warps = min(max(triton.next_power_of_2(dim) // 32, 1), 4)
    return width, 32 * warps, warps
