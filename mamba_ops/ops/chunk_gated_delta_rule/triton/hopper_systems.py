"""The systems of the gated delta rule's chunks on Hopper: what `_solve` of `kernels.py` does, with less traffic.

There a system is inverted by products of whole matrices, between which all of them go through shared memory, and most
of what is multiplied is zero. Here each warp has the rows of a part. With P made of the inverses of the parts on the
diagonal, and N = P @ (what is left of them), part p of the inverse's rows X is P[p] less the sum of N[p, q] @ X[q] over
the parts before: part after part is sent to the warps of those after it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from mamba_ops.ops._triton.common import within
from mamba_ops.ops._triton.decay import split, to_log2
from mamba_ops.ops._triton.delta_rule import CHUNK
from mamba_ops.ops._triton.hopper_tiles import FLAT, LEFT, OF_TOKENS, WIDE, barrier, load_tile
from mamba_ops.ops._triton.tape import observed

_NUMBERS_OF_CALL = (
    "q k g beta cu_seqlens slots scale q_stride k_stride g_stride beta_stride slots_stride length rows null_slot "
    "slot_count"
).split()
_split, _to_log2 = gluon.jit(split.fn), gluon.jit(to_log2.fn)  # the same source as other kernels have, for layouts
_CHUNK: gl.constexpr = gl.constexpr(CHUNK)
_ROW: gl.constexpr = gl.constexpr(gl.SliceLayout(1, OF_TOKENS))
_COLUMN: gl.constexpr = gl.constexpr(gl.SliceLayout(0, OF_TOKENS))
_THIN: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))  # 16 columns of all rows
_OWN: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))  # parts, one of each warp
_NUMBERS: gl.constexpr = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
_ROWS_OF_CALL: gl.constexpr = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
_SPREAD: gl.constexpr = gl.constexpr(
    # (part, column, copy, row): a thread has a column, and another warp has a copy of it
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 8]],
        [[0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0], [0, 8, 0, 0], [1, 0, 0, 0]],
        [[2, 0, 0, 0], [0, 0, 1, 0]],
        [],
        [4, 16, 2, 16],
    )
)
_COLUMNS: gl.constexpr = gl.constexpr(gl.SliceLayout(2, _SPREAD))
_TILE: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 2, [2, 1, 0]))
_THIN_TILE: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(8, 2, 2, [1, 0]))
_BY_COLUMNS: gl.constexpr = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _bounds(chunk, cu_seqlens, rows, length):
    # As `chunk_bounds`: of a chunk its row, and the range of its tokens.
    if cu_seqlens is not None:
        row = chunk * 0
        first = chunk * 0
        total = chunk * 0
        for start in range(0, rows, 128):
            r = start + gl.arange(0, 128, layout=_ROWS_OF_CALL)
            begins = within(gl.load(cu_seqlens + r, r < rows, other=0), length).to(gl.int32)
            counts = within(gl.load(cu_seqlens + r + 1, r < rows, other=0), length).to(gl.int32) - begins
            of_row = (gl.maximum(counts, 0) + _CHUNK - 1) // _CHUNK
            ends = total + gl.associative_scan(of_row, 0, _add)
            earlier = (r < rows) & (ends <= chunk)
            row += gl.sum(earlier.to(gl.int32), 0)
            first = gl.maximum(first, gl.max(gl.where(earlier, ends, 0), 0))
            total = gl.minimum(total + gl.sum(of_row, 0), 1 << 30)
        begin = within(gl.load(cu_seqlens + row, row < rows, other=0), length).to(gl.int32)
        end = within(gl.load(cu_seqlens + row + 1, row < rows, other=0), length).to(gl.int32)
        low = begin + (chunk - first) * _CHUNK
        return row, low, gl.minimum(low + _CHUNK, end)
    else:
        per_row = (length + _CHUNK - 1) // _CHUNK
        row = chunk // per_row
        low = chunk % per_row * _CHUNK
        return row, row * length + low, row * length + gl.minimum(low + _CHUNK, length)


@gluon.jit
def _exact_sums(log2_decay):
    # As `exact_sums`.
    limited = gl.where(log2_decay > -256.0, gl.minimum(log2_decay, 256.0), -256.0)
    steps = (limited * 2.0**40).to(gl.int64)
    total = gl.associative_scan(steps, 0, _add)
    return total, gl.sum(steps, 0) - total


@gluon.jit
def _exp2(x):
    # Where the result is subnormal it is zero: three instructions fewer.
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _length_factor(squares, L2NORM: gl.constexpr):
    factor = gl.full([_CHUNK], 1.0, gl.float32, layout=_ROW)
    if L2NORM:
        factor /= gl.sqrt(squares + 1e-6)
    return factor


@gluon.jit
def _columns_of(x):
    # Of 64 columns each 16.
    x = gl.permute(gl.reshape(x, [_CHUNK, 2, 2, 16]), [0, 3, 1, 2])
    even, odd = gl.split(x)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return (
        gl.convert_layout(a, _THIN),
        gl.convert_layout(b, _THIN),
        gl.convert_layout(c, _THIN),
        gl.convert_layout(d, _THIN),
    )


@gluon.jit
def _own(x, part):
    # The part on the diagonal that a warp has, one under the other.
    a, b, c, d = _columns_of(x)
    part = part[:, None]
    return gl.where(part == 0, a, gl.where(part == 1, b, gl.where(part == 2, c, d)))


@gluon.jit
def _diagonal(own):
    i = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, _THIN))
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, _THIN))
    return gl.sum(gl.where(i[:, None] % 16 == j[None, :], own, 0.0), axis=1)


@gluon.jit
def _inverses(parts):
    # As `_inverses_by_columns`: of parts (part, column, row), their inverses likewise.
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(0, _COLUMNS)))[None, :][None, :, :]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, _COLUMNS)))[None, :][:, :, None]
    solved = gl.where(row == column, 1.0, gl.zeros([4, 16, 16], gl.float32, layout=_COLUMNS))
    for j in gl.static_range(15):
        factor = parts.slice(j, 1, dim=1).load(_COLUMNS)
        pivot = gl.sum(gl.where(row == j, solved.to(gl.int32, bitcast=True), 0), axis=2).to(gl.float32, bitcast=True)
        solved = gl.where(row > j, solved - factor * gl.expand_dims(pivot, 2), solved)
    return solved


@gluon.jit
def _negated_product(inverse, rest):
    # Of each part, in its warp; as a left side. Of eight columns a thread has two neighbours, and left sides have
    # those four apart: so columns change places, and with them the rows of what is multiplied, see `_shared_rows`.
    zeros = gl.zeros([4, 16, 16], gl.float32, layout=_OWN)
    product = mma_v2(inverse, rest.load(gl.DotOperandLayout(1, _OWN, 1)), zeros, input_precision="tf32")
    product = gl.permute(gl.reshape(0.0 - product, [_CHUNK, 2, 4, 2]), [0, 1, 3, 2])
    return gl.convert_layout(gl.reshape(product, [_CHUNK, 16]), gl.DotOperandLayout(0, _THIN, 1))


@gluon.jit
def _shared_parts(x):
    return gl.allocate_shared_memory(gl.float32, [4, 16, 16], _TILE, gl.reshape(x, [4, 16, 16]))


@gluon.jit
def _shared_rows(x):
    x = gl.permute(gl.reshape(x, [_CHUNK // 8, 4, 2, 16]), [0, 2, 1, 3])
    return gl.allocate_shared_memory(gl.float32, [_CHUNK, 16], _THIN_TILE, gl.reshape(x, [_CHUNK, 16]))


@gluon.jit
def _less(x, n, tile, part: gl.constexpr):
    # 16 columns of the inverse, less what a part's rows of them, which lie there, add to those below.
    rows = tile.slice(16 * part, 16).load(gl.DotOperandLayout(1, _THIN, 1))
    return mma_v2(n, rows, x, input_precision="tf32")


@gluon.jit
def _joined(a, b, c, d):
    x = gl.permute(gl.join(gl.join(a, c), gl.join(b, d)), [0, 2, 3, 1])
    return gl.convert_layout(gl.reshape(x, [_CHUNK, _CHUNK]), OF_TOKENS)


@gluon.jit
def _store_tile(tile, pointer):
    # Eight rows in turn with those of the other one, less what is beyond a row's last part.
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, L))
    j = gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, L))
    pointers = gl.multiple_of(pointer + (((i + i // 8 * 8) * _CHUNK)[:, None] + j[None, :]), [1, 16])
    gl.store(pointers, tile.load(L), i[:, None] >= (j // 16 * 16)[None, :])


@observed
@gluon.jit(do_not_specialize=_NUMBERS_OF_CALL, do_not_specialize_on_alignment=_NUMBERS_OF_CALL)
def _invert(
    q,
    k,
    g,
    beta,
    cu_seqlens,
    slots,
    factors,  # out, as the next
    solved,
    scale,
    q_stride,
    k_stride,
    g_stride,
    beta_stride,
    slots_stride,
    length,
    rows,
    null_slot,
    slot_count,
    K_HEADS: gl.constexpr,
    V_HEADS: gl.constexpr,
    L2NORM: gl.constexpr,
):
    # As `_solve`, of keys of 128 numbers, dense and aligned.
    program = gl.program_id(0)
    chunk = program // V_HEADS
    head = program % V_HEADS
    row, low, high = _bounds(chunk, cu_seqlens, rows, length)
    if row >= rows:
        return
    if slots_stride >= 0:
        slot = gl.load(slots + row.to(gl.int64) * slots_stride).to(gl.int64)
        if (slot < 0) | (slot >= slot_count) | (slot == null_slot):
            return
    operand: gl.constexpr = solved.dtype.element_ty
    keys = gl.allocate_shared_memory(operand, [_CHUNK, 128], WIDE)
    queries = gl.allocate_shared_memory(operand, [_CHUNK, 128], WIDE)
    numbers = gl.allocate_shared_memory(gl.float32, [8, _CHUNK], FLAT)
    group: gl.constexpr = V_HEADS // K_HEADS
    at = low.to(gl.int64)
    load_tile(keys, k + at * k_stride + head // group * 128, k_stride, high - low, 0)
    async_copy.commit_group()
    load_tile(queries, q + at * q_stride + head // group * 128, q_stride, high - low, 0)
    async_copy.commit_group()
    n = gl.arange(0, _CHUNK, layout=_NUMBERS)
    t = low + n
    strength = gl.load(beta + head + t.to(gl.int64) * beta_stride, t < high, other=0.0).to(gl.float32)
    decay = gl.load(g + head + t.to(gl.int64) * g_stride, t < high, other=0.0).to(gl.float32) * 1.4426950408889634
    total, left = _exact_sums(decay)
    near, up, down = _split(total)
    numbers.index(0).store(near)
    numbers.index(1).store(up)
    numbers.index(2).store(down * strength)
    numbers.index(3).store(gl.where(decay == decay, gl.exp2(_to_log2(total)), decay))  # NaN stays NaN
    numbers.index(4).store(gl.exp2(_to_log2(left)) * strength)
    number = chunk.to(gl.int64) * V_HEADS + head
    factors += number * (3 * _CHUNK)
    solved += number * (2 * _CHUNK * _CHUNK)
    gl.store(factors + 2 * _CHUNK + n, gl.exp2(_to_log2(total + left)), n == 0)

    zeros = gl.zeros([_CHUNK, _CHUNK], gl.float32, layout=OF_TOKENS)
    async_copy.wait_group(1)
    barrier()
    fence_async_shared()
    turned = keys.permute([1, 0])
    system = warpgroup_mma(keys, turned, zeros, use_acc=False, is_async=True)
    async_copy.wait_group(0)
    barrier()
    queries_ = queries.load(LEFT)
    weight = warpgroup_mma(queries_, turned, zeros, use_acc=False, is_async=True)
    squares = queries_.to(gl.float32)
    squares = gl.convert_layout(gl.sum(squares * squares, 1), _ROW)
    of_query = _length_factor(squares, L2NORM) * scale
    i = gl.arange(0, _CHUNK, layout=_ROW)
    j = gl.arange(0, _CHUNK, layout=_COLUMN)
    system, weight = warpgroup_mma_wait(1, [system, weight])
    part = gl.arange(0, _CHUNK, layout=gl.SliceLayout(1, _THIN)) // 16
    of_key = _length_factor(gl.convert_layout(_diagonal(_own(system, part)), _ROW), L2NORM)
    numbers.index(5).store(of_key)
    since = numbers.index(3).load(_ROW)
    gl.store(factors + i, since * of_key)
    gl.store(factors + _CHUNK + i, since * of_query)
    system, weight = warpgroup_mma_wait(0, [system, weight])

    difference = numbers.index(0).load(_ROW)[:, None] - numbers.index(0).load(_COLUMN)[None, :]
    of_column = numbers.index(2).load(_COLUMN) * numbers.index(5).load(_COLUMN)
    between = _exp2(gl.where(i[:, None] >= j[None, :], difference, float("-inf"))) * of_column[None, :]
    ups = numbers.index(1).load(_ROW)
    weight = gl.convert_layout((weight * between * (of_query * ups)[:, None]).to(operand), LEFT)
    system = system * between * (of_key * ups)[:, None]
    # What is allocated from here on takes the places of keys and queries.
    own = gl.reshape(_own(system, part), [4, 16, 16])
    parts = gl.allocate_shared_memory(gl.float32, [4, 16, 16], _BY_COLUMNS, gl.permute(own, [0, 2, 1]))
    first, second, third, _ = _columns_of(system)
    first = _shared_parts(gl.where(part[:, None] > 0, first, 0.0))
    second = _shared_parts(gl.where(part[:, None] > 1, second, 0.0))
    third = _shared_parts(gl.where(part[:, None] > 2, third, 0.0))
    barrier()

    inverses = gl.allocate_shared_memory(gl.float32, [4, 16, 16], _TILE, gl.permute(_inverses(parts), [0, 2, 1]))
    barrier()
    inverse = inverses.load(gl.DotOperandLayout(0, _OWN, 1))
    n0 = _negated_product(inverse, first)
    n1 = _negated_product(inverse, second)
    n2 = _negated_product(inverse, third)
    own = gl.convert_layout(gl.reshape(inverses.load(_OWN), [_CHUNK, 16]), _THIN)
    x0 = gl.where(part[:, None] == 0, own, 0.0)
    x1 = gl.where(part[:, None] == 1, own, 0.0)
    x2 = gl.where(part[:, None] == 2, own, 0.0)
    x3 = gl.where(part[:, None] == 3, own, 0.0)
    rows0 = _shared_rows(x0)
    barrier()
    x0 = _less(x0, n0, rows0, 0)
    rows0 = _shared_rows(x0)
    rows1 = _shared_rows(x1)
    barrier()
    x0 = _less(x0, n1, rows0, 1)
    x1 = _less(x1, n1, rows1, 1)
    rows0 = _shared_rows(x0)
    rows1 = _shared_rows(x1)
    rows2 = _shared_rows(x2)
    barrier()
    x0 = _less(x0, n2, rows0, 2)
    x1 = _less(x1, n2, rows1, 2)
    x2 = _less(x2, n2, rows2, 2)

    S: gl.constexpr = gl.SliceLayout(1, _THIN)
    factor = (numbers.index(4).load(S) * numbers.index(5).load(S))[:, None]
    plain = gl.allocate_shared_memory(operand, [_CHUNK, _CHUNK], WIDE, _joined(x0, x1, x2, x3).to(operand))
    x = _joined(x0 * factor, x1 * factor, x2 * factor, x3 * factor)
    scaled = gl.allocate_shared_memory(operand, [_CHUNK, _CHUNK], WIDE, x.to(operand))
    fence_async_shared()
    barrier()
    weight = warpgroup_mma(weight, plain, zeros, use_acc=False, is_async=True)
    _store_tile(scaled, solved)
    weight = warpgroup_mma_wait(0, [weight])
    weights = gl.allocate_shared_memory(operand, [_CHUNK, _CHUNK], WIDE, weight.to(operand))
    barrier()
    _store_tile(weights, solved + 8 * _CHUNK)
