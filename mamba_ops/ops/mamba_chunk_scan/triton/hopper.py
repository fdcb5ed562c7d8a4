"""The scan of Mamba-2 on Hopper: what `_scan` of `kernels.py` does, by products that hand on registers.

Here channels are the rows of what is multiplied, and tokens or entries of a state its columns: a state stays in the
registers where products leave it, and is read from there. Four warps walk with one head, four with the next one of
its group, and four more load what they read, so that none waits for what another one computes. How much a piece's
tokens keep of each other does not depend on the state: that is found while a product with the state runs. The products
are those of `kernels.py`, each in the same order, and so are the roundings between them: so are the bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba_ops.ops._triton.common import final_slot, load_flag, load_slot
from mamba_ops.ops._triton.hopper_tiles import (
    FLAT,
    LEFT,
    LEFT_OF_STATE,
    OF_STATE,
    OF_TOKENS,
    WIDE,
    barrier,
    store_tile,
)
from mamba_ops.ops._triton.tape import observed
from mamba_ops.ops.mamba_chunk_scan.triton.hopper_tiles import (
    DIM,
    DSTATE,
    TOKENS,
    chunks_before_row,
    load_pieces,
    place_of_state,
    row_of_segment,
    store_state,
)
from mamba_ops.ops.mamba_chunk_scan.triton.pieces import (
    extent,
    first_piece,
    first_segment,
    first_start,
    numbers,
    piece_range,
)

_OF_CALL = (
    "x B C D z output cu_seqlens num_computed_tokens slots write_slots has_initial_state ssm_state chunk_states "
    "x_stride B_stride C_stride z_stride output_stride slots_stride write_stride initial_stride computed_stride "
    "slot_stride chunk_states_stride chunk_states_count rows starts_count extra length pieces segment null_slot "
    "slot_count"
).split()


@gluon.jit
def _walk_head(
    of_both,
    of_head,
    CHUNK: gl.constexpr,
    PIECE: gl.constexpr,
    SKIP: gl.constexpr,  # D: 0 none, 1 a number of a head, 2 of a channel
    GATED: gl.constexpr,
    KEPT: gl.constexpr,
    HEAD: gl.constexpr,
):
    # From piece to piece with one head's state, by four warps; what a product needs is waited for alone.
    PER_CHUNK: gl.constexpr = (CHUNK + PIECE - 1) // PIECE
    tiles, barriers, state, kept, D, output, output_stride, place = of_both
    entries, queries, values, others, gates, other_gates, factors = tiles
    there, free = barriers
    weights, written = of_head
    initial, start, target, carried, several, stored = state
    begin, before, count, first, last = place
    operand: gl.constexpr = entries.dtype
    STAGES: gl.constexpr = entries.shape[0]
    FIRST_NUMBER: gl.constexpr = HEAD * 4 * TOKENS
    if HEAD == 1:
        values = others
        gates = other_gates
    output += HEAD * DIM
    initial += HEAD * (DIM * DSTATE)
    start += HEAD * (DIM * DSTATE)
    target += HEAD * (DIM * DSTATE)
    places, inside = place_of_state(initial, 0)
    s = gl.load(places, inside & carried, other=0.0).to(gl.float32)
    places, inside = place_of_state(start, 0)
    s += gl.load(places, inside & several, other=0.0)
    if SKIP > 0:
        if SKIP > 1:
            channel = gl.arange(0, DIM, layout=gl.SliceLayout(1, OF_TOKENS))
            skip = gl.load(D + (HEAD * DIM + channel)).to(gl.float32)[:, None]
        else:
            skip = gl.load(D + HEAD).to(gl.float32)
    i = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, OF_TOKENS))
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, OF_TOKENS))
    nothing = gl.zeros([TOKENS, TOKENS], gl.float32, layout=OF_TOKENS)
    for piece in range(first, last):
        stage = (piece - first) % STAGES
        b = entries.index(stage)
        c = queries.index(stage)
        value = values.index(stage).permute([1, 0])
        of_piece = factors.index(stage).slice(FIRST_NUMBER, 4 * TOKENS)
        # The assembler lets nothing read a state while a product runs that it had to wait for.
        known = gl.convert_layout(s.to(operand), LEFT)
        mbarrier.wait(there.index(stage), (piece - first) // STAGES & 1)
        s *= gl.exp2(of_piece.slice(TOKENS - 1, 1).load(gl.SliceLayout(1, OF_STATE)))[:, None]
        fence_async_shared()
        pairs = warpgroup_mma(c, b.permute([1, 0]), nothing, use_acc=False, is_async=True)
        y = warpgroup_mma(known, c.permute([1, 0]), nothing, use_acc=False, is_async=True)
        pairs, y = warpgroup_mma_wait(1, [pairs, y])
        decay = of_piece.slice(0, TOKENS).load(gl.SliceLayout(0, OF_TOKENS))
        own = of_piece.slice(0, TOKENS).load(gl.SliceLayout(1, OF_TOKENS))
        size = of_piece.slice(TOKENS, TOKENS).load(gl.SliceLayout(0, OF_TOKENS))
        w = gl.where(i[:, None] >= j[None, :], own[:, None] - decay[None, :], float("-inf"))
        weights.store((gl.exp2(w) * size[None, :] * pairs).to(operand))
        fence_async_shared()
        weight = of_piece.slice(2 * TOKENS, TOKENS).load(gl.SliceLayout(0, OF_TOKENS))
        pushed = (value.load(OF_TOKENS).to(gl.float32) * weight[None, :]).to(operand)
        y = warpgroup_mma_wait(0, [y])
        y = y * gl.exp2(decay)[None, :]
        barrier()
        y = warpgroup_mma(value, weights.permute([1, 0]), y, is_async=True)
        s = warpgroup_mma(gl.convert_layout(pushed, LEFT_OF_STATE), b, s, is_async=True)
        low, high = piece_range(piece - 1, before, count, CHUNK, PIECE)
        at = output + (begin + low).to(gl.int64) * output_stride
        store_tile(written, at, output_stride, gl.where(piece > first, high - low, 0), piece >> 30)
        y, s = warpgroup_mma_wait(1, [y, s])
        up = of_piece.slice(3 * TOKENS, TOKENS).load(gl.SliceLayout(0, OF_TOKENS))
        y = y * up[None, :]
        if SKIP > 0:
            y += value.load(OF_TOKENS).to(gl.float32) * skip  # read again, as it would wait in registers
        if GATED:
            gate = gates.index(stage).permute([1, 0]).load(OF_TOKENS).to(gl.float32)
            y *= gate * (1 / (1 + gl.exp(-gate)))
        s = warpgroup_mma_wait(0, [s])
        async_copy.mbarrier_arrive(free.index(stage), increment_count=False)  # by each thread, without a barrier
        barrier()  # all are through with the weights and the output before
        written.permute([1, 0]).store(y.to(operand))
        if KEPT:
            pointer, stride, first_chunk, chunks = kept
            low, high = piece_range(piece, before, count, CHUNK, PIECE)
            number = first_chunk + piece // PER_CHUNK
            ended = ((piece + 1) % PER_CHUNK == 0) | (high == count)
            pointer += number.to(gl.int64) * stride + HEAD * (DIM * DSTATE)
            store_state(pointer, s, ended & (number < chunks), piece >> 30)
    if last > first:
        barrier()
        low, high = piece_range(last - 1, before, count, CHUNK, PIECE)
        at = output + (begin + low).to(gl.int64) * output_stride
        store_tile(written, at, output_stride, high - low, last >> 30)
    store_state(target, s, stored, last >> 30)


@observed
@gluon.jit(do_not_specialize=_OF_CALL, do_not_specialize_on_alignment=_OF_CALL)
def _walk(
    x,
    B,
    C,
    D,
    z,
    output,
    steps,
    starts,
    cu_seqlens,
    num_computed_tokens,
    slots,
    write_slots,
    has_initial_state,
    ssm_state,
    chunk_states,
    x_stride,
    B_stride,
    C_stride,
    z_stride,
    output_stride,
    slots_stride,
    write_stride,
    initial_stride,
    computed_stride,
    slot_stride,
    chunk_states_stride,
    chunk_states_count,
    rows,
    starts_count,
    extra,
    length,
    pieces,
    segment,  # pieces that it has
    null_slot,
    slot_count,
    HEADS: gl.constexpr,
    GROUPS: gl.constexpr,
    CHUNK: gl.constexpr,
    PIECE: gl.constexpr,
    D_PER_CHANNEL: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,
    WALK_REGISTERS: gl.constexpr,
):
    # As `_scan`, of two heads of a group with 64 channels and a state of 128, all dense and aligned.
    program = gl.program_id(0)
    segment_number = program // (HEADS // 2)
    head = program % (HEADS // 2) * 2
    row = row_of_segment(segment_number, rows, cu_seqlens, length, extra, segment, CHUNK, PIECE)
    if row < 0:
        return
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    begin, count, before = extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    piece_number = first_piece(row, begin, extra, CHUNK, PIECE)
    number = segment_number - first_segment(piece_number, row, segment)
    start = first_start(piece_number, segment) + number
    first, last = numbers(before, count, CHUNK, PIECE)
    last = gl.minimum(last, first + pieces - piece_number)
    several = last - first > segment
    piece_number += number * segment
    first += number * segment
    if (number < 0) | ((number > 0) & (first >= last)):  # there are fewer segments than programs
        return
    is_last = first + segment >= last
    last = gl.minimum(last, first + segment)
    output += head * DIM
    if source < 0:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        i = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, L))
        j = gl.arange(0, 2 * DIM, layout=gl.SliceLayout(0, L))
        zeros = gl.zeros([TOKENS, 2 * DIM], output.dtype.element_ty, layout=L)
        for piece in range(first, last):
            low, high = piece_range(piece, before, count, CHUNK, PIECE)
            t = low + i
            places = output + (((begin + t).to(gl.int64) * output_stride)[:, None] + j[None, :])
            gl.store(gl.multiple_of(places, [1, 16]), zeros, (t < high)[:, None] & (j < 2 * DIM)[None, :])
        return

    carried = load_flag(row, has_initial_state, initial_stride) & (several == 0)
    target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
    stored = stored & (is_last & (slot_stride >= 0))
    several = several & (start < starts_count)
    ssm_state += head * (DIM * DSTATE)
    starts += (start.to(gl.int64) * HEADS + head) * (DIM * DSTATE)
    state = (ssm_state + source * slot_stride, starts, ssm_state + target * slot_stride, carried, several, stored)
    kept = (ssm_state, row, row, row)
    if chunk_states is not None:
        first_chunk = chunks_before_row(row, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
        kept = (chunk_states + head * (DIM * DSTATE), chunk_states_stride, first_chunk, chunk_states_count)
    SKIP: gl.constexpr = 0 if D is None else 2 if D_PER_CHANNEL else 1
    GATED: gl.constexpr = z is not None
    KEPT: gl.constexpr = chunk_states is not None
    skips = starts
    if D is not None:
        if D_PER_CHANNEL:
            skips = D + head * DIM
        else:
            skips = D + head

    operand: gl.constexpr = x.dtype.element_ty
    entries = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DSTATE], WIDE)
    queries = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DSTATE], WIDE)
    values = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DIM], WIDE)
    others = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DIM], WIDE)
    gates = values
    other_gates = others
    given_z = x
    given_stride = x_stride
    if z is not None:
        gates = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DIM], WIDE)
        other_gates = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DIM], WIDE)
        given_z = z + head * DIM
        given_stride = z_stride
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, 8 * TOKENS], FLAT)
    weights = gl.allocate_shared_memory(operand, [TOKENS, TOKENS], WIDE)
    other_weights = gl.allocate_shared_memory(operand, [TOKENS, TOKENS], WIDE)
    written = gl.allocate_shared_memory(operand, [TOKENS, DIM], WIDE)
    other_written = gl.allocate_shared_memory(operand, [TOKENS, DIM], WIDE)
    there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(there.index(n), count=128)
        mbarrier.init(free.index(n), count=256)
    group = head // (HEADS // GROUPS) * DSTATE
    steps += (piece_number.to(gl.int64) * HEADS + head) * (4 * TOKENS)
    tiles = (entries, queries, values, others, gates, other_gates, factors)
    barriers = (there, free)
    sources = (x + head * DIM, B + group, C + group, given_z, steps)
    strides = (x_stride, B_stride, C_stride, given_stride)
    place = (begin, before, count, first, last)
    of_both = (tiles, barriers, state, kept, skips, output, output_stride, place)
    gl.warp_specialize(
        [
            (_walk_head, (of_both, (weights, written), CHUNK, PIECE, SKIP, GATED, KEPT, 0)),
            (_walk_head, (of_both, (other_weights, other_written), CHUNK, PIECE, SKIP, GATED, KEPT, 1)),
            (load_pieces, (tiles, barriers, sources, strides, place, HEADS, CHUNK, PIECE, GATED, True)),
        ],
        [4, 4],
        [WALK_REGISTERS, LOAD_REGISTERS],
    )
