"""What the kernels of mamba_chunk_scan for Hopper share: tiles in registers and shared memory, and loads of them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mamba_ops.ops._triton.hopper_tiles import OF_STATE, load_tile
from mamba_ops.ops.mamba_chunk_scan.triton.pieces import extent, first_piece, first_segment, piece_range

TOKENS: gl.constexpr = gl.constexpr(64)  # tokens of a tile: a piece has that many at most
DIM: gl.constexpr = gl.constexpr(64)
DSTATE: gl.constexpr = gl.constexpr(128)


@gluon.jit
def load_pieces(
    tiles,
    barriers,
    sources,
    strides,
    place,
    HEADS: gl.constexpr,
    CHUNK: gl.constexpr,
    PIECE: gl.constexpr,
    GATED: gl.constexpr,
    READ: gl.constexpr,
):
    # All that steps read, by warps of its own: a stage that is used up gets a piece's.
    entries, queries, values, others, gates, other_gates, factors = tiles
    there, free = barriers
    x, B, C, z, steps = sources
    x_stride, B_stride, C_stride, z_stride = strides
    begin, before, count, first, last = place
    STAGES: gl.constexpr = entries.shape[0]
    L: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    for piece in range(first, last):
        stage = (piece - first) % STAGES
        nil = piece >> 30  # zero, which a compiler does not know: else it keeps what depends on it in registers
        low, high = piece_range(piece, before, count, CHUNK, PIECE)
        left = high - low
        token = (begin + low).to(gl.int64)
        mbarrier.wait(free.index(stage), ((piece - first) // STAGES & 1) ^ 1)
        if READ:
            load_tile(queries.index(stage), C + token * C_stride, C_stride, left, nil)
        load_tile(entries.index(stage), B + token * B_stride, B_stride, left, nil)
        i = gl.arange(0, 8 * TOKENS, layout=L)
        async_copy.async_copy_global_to_shared(factors.index(stage), gl.multiple_of(steps + i, [16]))
        load_tile(values.index(stage), x + token * x_stride, x_stride, left, nil)
        load_tile(others.index(stage), x + (token * x_stride + DIM), x_stride, left, nil)
        if GATED:
            load_tile(gates.index(stage), z + token * z_stride, z_stride, left, nil)
            load_tile(other_gates.index(stage), z + (token * z_stride + DIM), z_stride, left, nil)
        async_copy.mbarrier_arrive(there.index(stage), increment_count=False)
        steps += HEADS * 4 * TOKENS
    async_copy.wait_group(0)


@gluon.jit
def place_of_state(pointer, nil):
    # Where a head's state lies, and that all of it is there.
    row = gl.arange(0, DIM, layout=gl.SliceLayout(1, OF_STATE))[:, None] + nil
    entry = gl.arange(0, DSTATE, layout=gl.SliceLayout(0, OF_STATE))[None, :]
    return gl.multiple_of(pointer + (row * DSTATE + entry), [1, 16]), (row < DIM) & (entry < DSTATE)


@gluon.jit
def store_state(pointer, s, wanted, nil):
    places, inside = place_of_state(pointer, nil)
    gl.store(places, s.to(pointer.dtype.element_ty), inside & wanted)


@gluon.jit
def row_of_segment(number, rows, cu_seqlens, length, extra, segment, CHUNK: gl.constexpr, PIECE: gl.constexpr):
    # As `row_of` of `pieces.py`, of a segment with so many pieces.
    R: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = number * 0 - 1
    for start in range(0, rows, 128):
        r = start + gl.arange(0, 128, layout=R)
        begin = r * length
        if cu_seqlens is not None:
            begin = gl.minimum(gl.maximum(gl.load(cu_seqlens + r, r < rows, other=0), 0), length).to(gl.int32)
        first = first_segment(first_piece(r, begin, extra, CHUNK, PIECE), r, segment)
        row += gl.sum(((r < rows) & (first <= number)).to(gl.int32), 0)
    return row


@gluon.jit
def chunks_before_row(row, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK: gl.constexpr):
    # As `chunks_before` of `pieces.py`.
    R: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    first = row * 0
    for start in range(0, row, 128):
        r = start + gl.arange(0, 128, layout=R)
        _, count, before = extent(r, r < row, cu_seqlens, num_computed_tokens, computed_stride, length, CHUNK)
        of_row = gl.where((r < row) & (count > 0), (before + count + CHUNK - 1) // CHUNK, 0)
        first = gl.minimum(first + gl.sum(of_row, 0), 1 << 30)
    return first
