"""The walk of the gated delta rule and of KDA on Hopper: what the `_scan` of each does, with products in registers.

Here values are the rows of what is multiplied, and tokens or keys its columns: all that a step hands from one product
to the next stays in the registers where the former left it. Four warps walk with 64 rows of a state, four with the
other 64, and four more load what both read, so that none waits for what another one computes. The products are those
of `_scan`, each in the same order, and so are the roundings between them: so are the bits.
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

from mamba_ops.ops._triton.common import final_slot, load_flag, load_slot, within
from mamba_ops.ops._triton.delta_rule import CHUNK
from mamba_ops.ops._triton.hopper_tiles import (
    FLAT,
    LEFT,
    LEFT_OF_STATE,
    OF_STATE,
    OF_TOKENS,
    WIDE,
    barrier,
    load_tile,
    store_tile,
)
from mamba_ops.ops._triton.tape import observed

_NUMBERS_OF_CALL = (
    "q k v cu_seqlens ssm_state slots write_slots has_initial_state output q_stride k_stride v_stride output_stride "
    "slots_stride write_stride initial_stride slot_stride length null_slot slot_count parts"
).split()
_CHUNK: gl.constexpr = gl.constexpr(CHUNK)
_ROWS: gl.constexpr = gl.constexpr(64)  # of a state, that four warps have


@gluon.jit
def _load_solved(tile, pointer, nil):
    # Of what `_solve` has for both, eight rows of either in turn; what is not there is zero.
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, L)) + nil
    j = gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, L))
    pointers = pointer + (((i + i // 8 * 8) * _CHUNK)[:, None] + j[None, :])
    pointers = gl.multiple_of(pointers, [1, 16])
    async_copy.async_copy_global_to_shared(tile, pointers, mask=i[:, None] >= (j // 16 * 16)[None, :])


@gluon.jit
def _load_readers(tile, pointer, left, nil):
    # A chunk's rows of 128 numbers, of two matrices eight rows of either in turn.
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    i = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, L)) + nil
    j = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    pointers = gl.multiple_of(pointer + (((i + i // 8 * 8) * 128)[:, None] + j[None, :]), [1, 16])
    async_copy.async_copy_global_to_shared(tile, pointers, mask=(i < left)[:, None] & (j < 128)[None, :])


@gluon.jit
def _load(tiles, barriers, sources, strides, bounds, parts, V_HEADS: gl.constexpr):
    # All that steps read, by warps of its own: a stage that is used up gets a chunk's.
    pairs, ends, values, others, both, factors = tiles
    there, free = barriers
    k, q, keyed, v, solved, of_factors = sources
    k_stride, q_stride, v_stride = strides
    chunks, count = bounds
    STAGES: gl.constexpr = pairs.shape[0]
    NUMBERS: gl.constexpr = 3 * _CHUNK if keyed is None else 128
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for chunk in range(chunks):
        stage = chunk % STAGES
        nil = chunk >> 30  # zero, which a compiler does not know: else it keeps what depends on it in registers
        left = count - chunk * _CHUNK
        mbarrier.wait(free.index(stage), (chunk // STAGES & 1) ^ 1)
        keys = pairs.index(stage).slice(0, _CHUNK)
        queries = pairs.index(stage).slice(_CHUNK, _CHUNK)
        if keyed is None:
            load_tile(keys, k, k_stride, left, nil)
            load_tile(queries, q, q_stride, left, nil)
            k += _CHUNK * k_stride.to(gl.int64)
            q += _CHUNK * q_stride.to(gl.int64)
        else:
            _load_readers(keys, keyed, left, nil)
            _load_readers(queries, keyed + 8 * 128, left, nil)
            load_tile(ends.index(stage), keyed + 2 * _CHUNK * 128, nil + 128, left, nil)
            keyed += V_HEADS * 4 * _CHUNK * 128
        load_tile(values.index(stage), v, v_stride, left, nil)
        if parts == 1:
            load_tile(others.index(stage), v + 64, v_stride, left, nil)
        i = gl.arange(0, factors.shape[1], layout=L)
        async_copy.async_copy_global_to_shared(factors.index(stage), of_factors + i, mask=i < NUMBERS)
        _load_solved(both.index(stage).slice(0, _CHUNK), solved, nil)
        _load_solved(both.index(stage).slice(_CHUNK, _CHUNK), solved + 8 * _CHUNK, nil)
        async_copy.mbarrier_arrive(there.index(stage), increment_count=False)
        v += _CHUNK * v_stride.to(gl.int64)
        of_factors += V_HEADS * NUMBERS
        solved += V_HEADS * 2 * _CHUNK * _CHUNK
    async_copy.wait_group(0)


@gluon.jit
def _times(x, matrix, like):
    # The product with a matrix whose rows are the columns of the result.
    return warpgroup_mma(x, matrix.permute([1, 0]), like, use_acc=False, is_async=True)


@gluon.jit
def _halves(x):
    # The first half of columns, and the others.
    x, y = gl.split(gl.permute(gl.reshape(x, [_ROWS, 2, _CHUNK]), [0, 2, 1]))
    return gl.convert_layout(x, OF_TOKENS), gl.convert_layout(y, OF_TOKENS)


@gluon.jit
def _of_state(pointer, nil):
    # Where 64 rows of a state lie, and that all of them are there.
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, OF_STATE))[:, None] + nil
    key = gl.arange(0, 128, layout=gl.SliceLayout(0, OF_STATE))[None, :]
    return gl.multiple_of(pointer + (row * 128 + key), [1, 16]), (row < _ROWS) & (key < 128)


@gluon.jit
def _walk_rows(
    tiles, barriers, written, state, output, output_stride, bounds, PART: gl.constexpr, BY_CHANNEL: gl.constexpr
):
    # From chunk to chunk with 64 rows of a state, by four warps. What multiplies the same is one product: 128 columns
    # wide, as narrow ones are slower.
    pairs, ends, values, others, both, factors = tiles
    there, free = barriers
    source, target, carried, stored = state
    chunks, count = bounds
    operand: gl.constexpr = pairs.dtype
    STAGES: gl.constexpr = pairs.shape[0]
    if PART == 1:
        values = others
        output += _ROWS
        source += _ROWS * 128
        target += _ROWS * 128
    places, inside = _of_state(source, 0)
    s = gl.load(places, inside & carried, other=0.0).to(gl.float32)
    nothing = gl.zeros([_ROWS, 2 * _CHUNK], gl.float32, layout=OF_STATE)
    for chunk in range(chunks):
        stage = chunk % STAGES
        numbers = factors.index(stage)
        known = gl.convert_layout(s.to(operand), LEFT)
        mbarrier.wait(there.index(stage), chunk // STAGES & 1)
        fence_async_shared()
        found = _times(known, pairs.index(stage), nothing)
        barrier()  # meanwhile all are beyond the chunk before
        if chunk > 0:
            mbarrier.arrive(free.index((chunk - 1) % STAGES), count=1)
            store_tile(written, output, output_stride, count - (chunk - 1) * _CHUNK, chunk >> 30)
            output += _CHUNK * output_stride.to(gl.int64)
        found = warpgroup_mma_wait(0, [found])
        found, y = _halves(found)
        lacking = values.index(stage).permute([1, 0]).load(OF_TOKENS).to(gl.float32)
        if not BY_CHANNEL:
            found *= numbers.slice(0, _CHUNK).load(gl.SliceLayout(0, OF_TOKENS))[None, :]
        lacking -= found
        lacking = gl.convert_layout(lacking.to(operand), LEFT)
        kept = _times(lacking, both.index(stage), nothing)
        if BY_CHANNEL:
            s *= numbers.load(gl.SliceLayout(0, OF_STATE))[None, :]
        else:
            s *= numbers.slice(2 * _CHUNK, 1).load(gl.SliceLayout(1, OF_STATE))[:, None]
        kept, y = warpgroup_mma_wait(0, [kept, y])
        kept, read = _halves(kept)
        kept = gl.convert_layout(kept.to(operand), LEFT_OF_STATE)
        if BY_CHANNEL:
            s = warpgroup_mma(kept, ends.index(stage), s, is_async=True)
        else:
            s = warpgroup_mma(kept, pairs.index(stage).slice(0, _CHUNK), s, is_async=True)
            y *= numbers.slice(_CHUNK, _CHUNK).load(gl.SliceLayout(0, OF_TOKENS))[None, :]
        y += read
        written.permute([1, 0]).store(y.to(operand))
        s = warpgroup_mma_wait(0, [s])
    if chunks > 0:
        barrier()
        store_tile(written, output, output_stride, count - (chunks - 1) * _CHUNK, 0)
    places, inside = _of_state(target, chunks >> 30)  # not before, as they would wait in registers
    gl.store(places, s.to(target.dtype.element_ty), inside & stored)


@gluon.jit
def _walk_others(tiles, barriers, written, state, output, output_stride, bounds, parts, BY_CHANNEL: gl.constexpr):
    # The other 64 rows, if a program has all.
    if parts == 1:
        _walk_rows(tiles, barriers, written, state, output, output_stride, bounds, 1, BY_CHANNEL)


@observed
@gluon.jit(do_not_specialize=_NUMBERS_OF_CALL, do_not_specialize_on_alignment=_NUMBERS_OF_CALL)
def _walk(
    q,
    k,
    v,
    cu_seqlens,
    ssm_state,
    slots,
    write_slots,
    has_initial_state,
    output,
    factors,  # (chunks, v_heads, 3, CHUNK) of the gated delta rule, (chunks, v_heads, 128) of KDA: its `whole`
    keyed,  # (chunks, v_heads, 4, CHUNK, 128), of KDA in place of q and k: see its `_decay`
    solved,
    q_stride,
    k_stride,
    v_stride,
    output_stride,
    slots_stride,
    write_stride,
    initial_stride,
    slot_stride,
    length,
    null_slot,
    slot_count,
    parts,  # of a state's rows, each of a program: 1 or 2
    K_HEADS: gl.constexpr,
    V_HEADS: gl.constexpr,
    STAGES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,
    WALK_REGISTERS: gl.constexpr,
):
    # As `_scan` of either op, of values and keys of 128 numbers, all dense and aligned.
    program = gl.program_id(0)
    row = program // (parts * V_HEADS)
    head = program // parts % V_HEADS
    part = program % parts * _ROWS
    rows = gl.num_programs(0) // (parts * V_HEADS)
    if cu_seqlens is not None:
        R: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        before = row * 0
        for start in range(0, row, 128):
            r = start + gl.arange(0, 128, layout=R)
            begins = within(gl.load(cu_seqlens + r, r < row, other=0), length).to(gl.int32)
            counts = within(gl.load(cu_seqlens + r + 1, r < row, other=0), length).to(gl.int32) - begins
            before = gl.minimum(before + gl.sum((gl.maximum(counts, 0) + _CHUNK - 1) // _CHUNK, 0), 1 << 30)
        begin = within(gl.load(cu_seqlens + row), length).to(gl.int32)
        count = gl.maximum(within(gl.load(cu_seqlens + row + 1), length).to(gl.int32) - begin, 0)
        most = gl.maximum(length // _CHUNK + rows - before, 0)
        chunks = gl.minimum((count + _CHUNK - 1) // _CHUNK, most)
        count = gl.minimum(count, chunks * _CHUNK)
    else:
        chunks = (length + _CHUNK - 1) // _CHUNK
        before = row * chunks
        begin = row * length
        count = begin - begin + length
    source = load_slot(row, slots, slots_stride, null_slot, slot_count)
    output += begin.to(gl.int64) * output_stride + head * 128 + part
    if source < 0:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        i = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, L))
        j = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, L))
        nothing = gl.zeros([_CHUNK, _ROWS], output.dtype.element_ty, layout=L)
        for chunk in range(chunks * (2 // parts)):
            t = chunk % chunks * _CHUNK + i
            place = output + chunk // chunks * _ROWS + ((t.to(gl.int64) * output_stride)[:, None] + j[None, :])
            gl.store(gl.multiple_of(place, [1, 16]), nothing, (t < count)[:, None] & (j < _ROWS)[None, :])
        return

    target, stored = final_slot(row, source, count, write_slots, write_stride, null_slot, slot_count)
    stored = stored & (slot_stride >= 0)
    carried = load_flag(row, has_initial_state, initial_stride)
    ssm_state += (head * 128 + part) * 128
    state = (ssm_state + source * slot_stride, ssm_state + target * slot_stride, carried, stored)

    operand: gl.constexpr = solved.dtype.element_ty
    BY_CHANNEL: gl.constexpr = keyed is not None
    NUMBERS: gl.constexpr = 128 if BY_CHANNEL else 3 * _CHUNK
    pairs = gl.allocate_shared_memory(operand, [STAGES, 2 * _CHUNK, 128], WIDE)
    values = gl.allocate_shared_memory(operand, [STAGES, _CHUNK, _ROWS], WIDE)
    others = gl.allocate_shared_memory(operand, [STAGES, _CHUNK, _ROWS], WIDE)
    both = gl.allocate_shared_memory(operand, [STAGES, 2 * _CHUNK, _CHUNK], WIDE)
    of_both = gl.allocate_shared_memory(gl.float32, [STAGES, 128 if BY_CHANNEL else 256], FLAT)
    written = gl.allocate_shared_memory(operand, [_CHUNK, _ROWS], WIDE)
    written_others = gl.allocate_shared_memory(operand, [_CHUNK, _ROWS], WIDE)
    there = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(there.index(n), count=128)
        if parts == 1:
            mbarrier.init(free.index(n), count=2)
        else:
            mbarrier.init(free.index(n), count=1)
    number = before.to(gl.int64) * V_HEADS + head
    v += begin.to(gl.int64) * v_stride + head * 128 + part
    if BY_CHANNEL:
        ends = gl.allocate_shared_memory(operand, [STAGES, _CHUNK, 128], WIDE)
        keyed += number * (4 * _CHUNK * 128)
    else:
        ends = pairs
        group: gl.constexpr = V_HEADS // K_HEADS
        k += begin.to(gl.int64) * k_stride + head // group * 128
        q += begin.to(gl.int64) * q_stride + head // group * 128
    tiles = (pairs, ends, values, others, both, of_both)
    barriers = (there, free)
    sources = (k, q, keyed, v, solved + number * (2 * _CHUNK * _CHUNK), factors + number * NUMBERS)
    strides = (k_stride, q_stride, v_stride)
    bounds = (chunks, count)
    gl.warp_specialize(
        [
            (_walk_rows, (tiles, barriers, written, state, output, output_stride, bounds, 0, BY_CHANNEL)),
            (
                _walk_others,
                (tiles, barriers, written_others, state, output, output_stride, bounds, parts, BY_CHANNEL),
            ),
            (_load, (tiles, barriers, sources, strides, bounds, parts, V_HEADS)),
        ],
        [4, 4],
        [WALK_REGISTERS, LOAD_REGISTERS],
    )
