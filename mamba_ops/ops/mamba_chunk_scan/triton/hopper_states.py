"""The states that segments begin with, on Hopper: as `_states` of `kernels.py`, by the products of `hopper.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mamba_ops.ops._triton.common import load_flag, load_slot
from mamba_ops.ops._triton.hopper_tiles import (
    FLAT,
    LEFT_OF_STATE,
    OF_STATE,
    OF_TOKENS,
    WIDE,
)
from mamba_ops.ops._triton.tape import observed
from mamba_ops.ops.mamba_chunk_scan.triton.hopper_tiles import (
    DIM,
    DSTATE,
    TOKENS,
    load_pieces,
    place_of_state,
    store_state,
)
from mamba_ops.ops.mamba_chunk_scan.triton.pieces import extent, first_piece, first_start, numbers

_OF_CALL = (
    "x B cu_seqlens num_computed_tokens slots has_initial_state ssm_state x_stride B_stride slots_stride "
    "initial_stride computed_stride slot_stride starts_count extra length pieces segment null_slot slot_count"
).split()


@gluon.jit
def _advance_head(tiles, barriers, state, first, last, segment, HEADS: gl.constexpr, HEAD: gl.constexpr):
    # From piece to piece with one head's state alone, which is stored where segments begin.
    entries, values, others, factors = tiles
    there, free = barriers
    initial, starts, left_starts, carried = state
    operand: gl.constexpr = entries.dtype
    STAGES: gl.constexpr = entries.shape[0]
    FIRST_NUMBER: gl.constexpr = HEAD * 4 * TOKENS
    if HEAD == 1:
        values = others
    initial += HEAD * (DIM * DSTATE)
    starts += HEAD * (DIM * DSTATE)
    places, inside = place_of_state(initial, 0)
    s = gl.load(places, inside & carried, other=0.0).to(gl.float32)
    store_state(starts, s, left_starts > 0, first >> 30)
    until_next = segment
    for piece in range(first, last):
        stage = (piece - first) % STAGES
        of_piece = factors.index(stage).slice(FIRST_NUMBER, 4 * TOKENS)
        mbarrier.wait(there.index(stage), (piece - first) // STAGES & 1)
        s *= gl.exp2(of_piece.slice(TOKENS - 1, 1).load(gl.SliceLayout(1, OF_STATE)))[:, None]
        weight = of_piece.slice(2 * TOKENS, TOKENS).load(gl.SliceLayout(0, OF_TOKENS))
        pushed = (values.index(stage).permute([1, 0]).load(OF_TOKENS).to(gl.float32) * weight[None, :]).to(operand)
        fence_async_shared()
        s = warpgroup_mma(gl.convert_layout(pushed, LEFT_OF_STATE), entries.index(stage), s, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        async_copy.mbarrier_arrive(free.index(stage), increment_count=False)
        until_next -= 1
        if until_next == 0:
            until_next = segment
            left_starts -= 1
            starts += HEADS * (DIM * DSTATE)
            store_state(starts, s, left_starts > 0, piece >> 30)


@observed
@gluon.jit(do_not_specialize=_OF_CALL, do_not_specialize_on_alignment=_OF_CALL)
def _advance(
    x,
    B,
    cu_seqlens,
    num_computed_tokens,
    slots,
    has_initial_state,
    ssm_state,
    steps,
    starts,
    x_stride,
    B_stride,
    slots_stride,
    initial_stride,
    computed_stride,
    slot_stride,
    starts_count,
    extra,
    length,
    pieces,
    segment,
    null_slot,
    slot_count,
    HEADS: gl.constexpr,
    GROUPS: gl.constexpr,
    CHUNK: gl.constexpr,
    PIECE: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,
    WALK_REGISTERS: gl.constexpr,
):
    # As `_states`, but by the products of `_walk`: how many segments a row has changes no bit.
    program = gl.program_id(0)
    row = program // (HEADS // 2)
    head = program % (HEADS // 2) * 2
    begin, count, before = extent(row, True, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    piece_number = first_piece(row, begin, extra, CHUNK, PIECE)
    first, last = numbers(before, count, CHUNK, PIECE)
    last = gl.minimum(last, first + pieces - piece_number)
    if (last - first <= segment) | (source < 0):
        return
    last = first + (last - first - 1) // segment * segment
    carried = load_flag(row, has_initial_state, initial_stride)
    start = first_start(piece_number, segment)
    initial = ssm_state + (source * slot_stride + head * (DIM * DSTATE))
    starts += (start.to(gl.int64) * HEADS + head) * (DIM * DSTATE)

    operand: gl.constexpr = x.dtype.element_ty
    entries = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DSTATE], WIDE)
    values = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DIM], WIDE)
    others = gl.allocate_shared_memory(operand, [STAGES, TOKENS, DIM], WIDE)
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, 8 * TOKENS], FLAT)
    there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(there.index(n), count=128)
        mbarrier.init(free.index(n), count=256)
    steps += (piece_number.to(gl.int64) * HEADS + head) * (4 * TOKENS)
    barriers = (there, free)
    B += head // (HEADS // GROUPS) * DSTATE
    state = (initial, starts, starts_count - start, carried)
    place = (begin, before, count, first, last)
    own = (entries, values, others, factors)
    tiles = (entries, entries, values, others, values, others, factors)
    sources = (x + head * DIM, B, B, x, steps)
    strides = (x_stride, B_stride, B_stride, x_stride)
    gl.warp_specialize(
        [
            (_advance_head, (own, barriers, state, first, last, segment, HEADS, 0)),
            (_advance_head, (own, barriers, state, first, last, segment, HEADS, 1)),
            (load_pieces, (tiles, barriers, sources, strides, place, HEADS, CHUNK, PIECE, False, False)),
        ],
        [4, 4],
        [WALK_REGISTERS, LOAD_REGISTERS],
    )
