"""What the kernels of the gated delta rules share, whatever decays what."""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from mamba_ops.ops._triton.limits import Limits
from mamba_ops.ops._triton.sums import clear

if TYPE_CHECKING:
    from mamba_ops.ops._common.delta_rule import BackwardArguments

CHUNK = 64
PART = 16
"""Of a chunk: systems of so many tokens are solved token by token."""
_PART: tl.constexpr = tl.constexpr(PART)


@triton.jit
def length_factor(x, L2NORM: tl.constexpr):
    # The factor that gives a row length 1.
    factor = tl.full([x.shape[0]], 1.0, tl.float32)
    if L2NORM:
        x = x.to(tl.float32)
        factor /= tl.sqrt(tl.sum(x * x, axis=1) + 1e-6)
    return factor


@triton.jit
def factor_of_squares(products, L2NORM: tl.constexpr):
    # The same of rows whose products with each other are known: in registers, squares would be summed across threads.
    factor = tl.full([products.shape[0]], 1.0, tl.float32)
    if L2NORM:
        i = tl.arange(0, products.shape[0])
        factor /= tl.sqrt(tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), axis=1) + 1e-6)
    return factor


@triton.jit
def _inverses_by_columns(part):
    # Of 1 + each part, (parts, rows, columns): by elimination of a column after the other. A thread has one column of
    # an inverse, and all that it needs of the part, so that no step waits for another thread. Four warps have twice as
    # many threads as there are columns: a layout would split each column between two, were there not two copies.
    PARTS: tl.constexpr = part.shape[0]
    part = tl.permute(part.to(tl.int32, bitcast=True), (1, 2, 0))
    part = tl.expand_dims(tl.expand_dims(part, 2), 4)
    part = tl.broadcast_to(part, [_PART, _PART, 2, PARTS, _PART])
    i = tl.arange(0, _PART)
    row = i[:, None, None, None]
    solved = tl.broadcast_to(tl.where(row == i[None, None, None, :], 1.0, 0.0), [_PART, 2, PARTS, _PART])
    for j in tl.static_range(_PART - 1):
        # One entry is picked by a sum of bits with zeros: of integers a compiler knows that this changes nothing.
        factor = tl.sum(tl.where(i[None, :, None, None, None] == j, part, 0), axis=1).to(tl.float32, bitcast=True)
        pivot = tl.sum(tl.where(row == j, solved.to(tl.int32, bitcast=True), 0), axis=0).to(tl.float32, bitcast=True)
        solved = tl.where(row > j, solved - factor * tl.expand_dims(pivot, 0), solved)
    solved, _ = tl.split(tl.permute(solved, (2, 0, 3, 1)))
    return solved


@triton.jit
def _inverses_in_place(part):
    # The same, and every entry stays with the thread that has it.
    row = tl.arange(0, _PART)[None, :, None]
    column = tl.arange(0, _PART)[None, None, :]
    part = tl.where(row > column, part, 0.0)
    solved = tl.where(row == column, 1.0, part * 0.0)
    for j in range(_PART - 1):
        factor = tl.sum(tl.where(column == j, part, 0.0), axis=2)
        pivot = tl.sum(tl.where(row == j, solved, 0.0), axis=1)
        solved -= factor[:, :, None] * pivot[:, None, :]
    return solved


@triton.jit
def inverse_of(system, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    # Of 1 + what is below the diagonal of system: nothing else is looked at. First of the parts on its diagonal, all at
    # once. With P made of those inverses, and N = P @ (what is left of them), N^4 is zero, and the whole inverse is
    # (1 - N) (1 + N^2) P.
    PARTS: tl.constexpr = CHUNK // _PART
    i = tl.arange(0, PARTS)
    own = (i[:, None] == i[None, :])[:, :, None, None]
    parts = tl.permute(tl.reshape(system, [PARTS, _PART, PARTS, _PART]), (0, 2, 1, 3))
    part = tl.sum(tl.where(own, parts, 0.0), axis=1)
    if PRECISION == "tf32":
        solved = _inverses_by_columns(part)
    else:  # products of numbers that are split up have no registers left for whole columns
        solved = _inverses_in_place(part)
    whole = tl.where(own, tl.expand_dims(solved, 1), 0.0)
    whole = tl.reshape(tl.permute(whole, (0, 2, 1, 3)), [CHUNK, CHUNK])
    i = tl.arange(0, CHUNK)
    rest = tl.where(i[:, None] // _PART > i[None, :] // _PART, system, 0.0)
    n = tl.dot(whole, rest, input_precision=PRECISION)
    square = tl.dot(n, n, input_precision=PRECISION)
    whole += tl.dot(square, whole, input_precision=PRECISION)
    return whole - tl.dot(n, whole, input_precision=PRECISION)


@triton.jit
def times_inverse(x, inverse, operand: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    # The last product of a kernel that inverts systems. triton-xpu 3.3 goes by the last one whether matrix units make
    # all of a kernel's, and for float16 there are none for those of the inverse.
    if operand == tl.float16:
        product = tl.dot(x.to(tl.float32), inverse.to(tl.float32), input_precision=PRECISION)
    else:
        product = tl.dot(x, inverse, input_precision=EXACT)
    return product


@triton.jit
def row_of_both(i):
    # Where rows of the first of two matrices are among those of both, eight of either in turn.
    return i + i // 8 * 8


@triton.jit
def halves(x):
    # Of every 16 rows the first eight, and the last ones: a thread has both of what matrix units give.
    ROWS: tl.constexpr = x.shape[0] // 2
    x = tl.permute(tl.reshape(x, [ROWS // 8, 2, 8, x.shape[1]]), (0, 2, 3, 1))
    return tl.split(tl.reshape(x, [ROWS, x.shape[2], 2]))


@triton.jit
def state_offsets(
    head,
    value,
    key,
    head_stride,  # this and the next two are None for an ALIGNED state, which is dense
    value_stride,
    key_stride,
    V_DIM: tl.constexpr,
    K_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    JOINED: tl.constexpr,
):
    # Where a head's state lies in its slot, and which of it is there. JOINED: keys are the rows, values the columns.
    if JOINED:
        at_value = value[None, :]
        at_key = key[:, None]
    else:
        at_value = value[:, None]
        at_key = key[None, :]
    if ALIGNED:
        offsets = (head * V_DIM + at_value) * K_DIM + at_key
    else:
        offsets = at_value.to(tl.int64) * value_stride + at_key.to(tl.int64) * key_stride
        offsets += head.to(tl.int64) * head_stride
    return offsets, (at_value < V_DIM) & (at_key < K_DIM)


@triton.jit
def load_numbers(numbers, head, t, stride, high):
    # A number for each token, zero where there is none.
    return tl.load(numbers + head + t.to(tl.int64) * stride, t < high, other=0.0).to(tl.float32)


@triton.jit
def through_norm(x, grad):
    # The gradient of rows x, given that of the rows with length 1.
    x = x.to(tl.float32)
    factor = tl.expand_dims(length_factor(x, True), 1)
    x *= factor
    return (grad - x * tl.expand_dims(tl.sum(x * grad, axis=1), 1)) * factor


def precisions_of(operand: str, limits: Limits) -> dict[str, str]:
    """Return in which precision chunks' systems are inverted, and in which operands are multiplied."""
    bits = {"bfloat16": 11, "float16": 16}.get(operand, 24)
    return {"PRECISION": limits.precision(bits), "EXACT": limits.precision(24) if bits == 24 else "ieee"}


def gradients_of(call: "BackwardArguments") -> dict[str, Tensor]:
    """Return what a backward pass writes for tokens, by input, zero where a kernel writes nothing.

    None, where there is no token: then that of initial states is written here, too.
    """
    gradients = {"q": call.grad_q, "k": call.grad_k, "v": call.grad_v, "g": call.grad_g, "beta": call.grad_beta}
    rows = call.v.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    is_empty = rows == 0 or call.v.numel() == 0
    if is_empty or call.cu_seqlens is not None:  # tokens past the last row
        for gradient in gradients.values():
            clear(gradient)
    if is_empty and call.initial_states is not None:
        if call.grad_final_states is None:
            clear(call.grad_initial_states)
        else:
            call.grad_initial_states.copy_(call.grad_final_states)
    return {} if is_empty else gradients
