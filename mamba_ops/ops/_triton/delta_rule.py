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
def _quarters(x):
    # Of a lower triangular square: the first on its diagonal, the one below that, and the last.
    HALF: tl.constexpr = x.shape[0] // 2
    x = tl.permute(tl.reshape(x, [2, HALF, 2, HALF]), (1, 3, 0, 2))
    left, right = tl.split(x)
    first, below = tl.split(left)
    _, last = tl.split(right)
    return first, below, last


@triton.jit
def _square(first, below, last):
    # The square of these quarters, with zeros above the diagonal.
    left = tl.join(first, below)
    right = tl.join(tl.zeros_like(last), last)
    x = tl.permute(tl.join(left, right), (2, 0, 3, 1))
    return tl.reshape(x, [2 * first.shape[0], 2 * first.shape[0]])


@triton.jit
def _joined(first, below, last, PRECISION: tl.constexpr):
    # The inverse of a lower triangular square, given its quarter below the diagonal and the inverses of those on it.
    # The first product is turned: else triton-xpu 3.3.0b1 gives a square of squares two layouts.
    below = tl.trans(tl.dot(tl.trans(first), tl.trans(below), input_precision=PRECISION))
    below = tl.dot(last, below, input_precision=PRECISION)
    return _square(first, -below, last)


@triton.jit
def inverse_of(system, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    # Of 1 + system, which is strictly lower triangular. First of the four parts on its diagonal, all at once, row by
    # row; then of the two squares of two parts, and of the whole.
    tl.static_assert(CHUNK == 4 * _PART)
    first, below, last = _quarters(system)
    part_0, below_0, part_1 = _quarters(first)
    part_2, below_1, part_3 = _quarters(last)
    part = tl.join(tl.join(part_0, part_2), tl.join(part_1, part_3))
    part = tl.reshape(part, [_PART, _PART, 4])
    row = tl.arange(0, _PART)[:, None, None]
    column = tl.arange(0, _PART)[None, :, None]
    solved = tl.where(row == column, 1.0, part * 0.0)
    for j in tl.static_range(1, _PART):
        factors = tl.sum(tl.where(row == j, part, 0.0), axis=0)
        known = tl.sum(factors[:, None, :] * solved, axis=0)
        solved -= tl.where(row == j, known[None, :, :], 0.0)
    left, right = tl.split(tl.reshape(solved, [_PART, _PART, 2, 2]))
    part_0, part_2 = tl.split(left)
    part_1, part_3 = tl.split(right)
    first = _joined(part_0, below_0, part_1, PRECISION)
    last = _joined(part_2, below_1, part_3, PRECISION)
    return _joined(first, below, last, PRECISION)


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
