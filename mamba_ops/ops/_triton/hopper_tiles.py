"""What kernels in Gluon for Hopper share: layouts of registers and shared memory, and loads and stores of tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name from Triton 3.7 on, and before
OF_STATE: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
OF_TOKENS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LEFT: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, OF_TOKENS, 2))
LEFT_OF_STATE: gl.constexpr = gl.constexpr(gl.DotOperandLayout(0, OF_STATE, 2))
FLAT: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
WIDE: gl.constexpr = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def load_tile(tile, pointer, stride, left, nil):
    # The rows of a chunk or piece, asynchronously; zero where there is no token.
    SIZE: gl.constexpr = tile.shape[1]
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIZE, SIZE // 8], [4, 1], [1, 0])
    i = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, L)) + nil
    j = gl.arange(0, SIZE, layout=gl.SliceLayout(0, L))
    pointers = gl.multiple_of(pointer + ((i * stride)[:, None] + j[None, :]), [1, 16])
    async_copy.async_copy_global_to_shared(tile, pointers, mask=(i < left)[:, None] & (j < SIZE)[None, :])


@gluon.jit
def store_tile(tile, pointer, stride, left, nil):
    # The 64 columns of those rows that are tokens.
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, L)) + nil
    j = gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    pointers = gl.multiple_of(pointer + ((i * stride)[:, None] + j[None, :]), [1, 16])
    gl.store(pointers, tile.load(L), (i < left)[:, None] & (j < 64)[None, :])
