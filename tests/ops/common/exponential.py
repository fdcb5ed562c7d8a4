"""The exponential that kernels have, and what it is taken of."""

from typing import Any

import torch
from torch import Tensor


class _Exp(torch.autograd.Function):
    """Rounded as it is, differentiated as an exponential."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        exact = torch.exp(x)
        result = exact if x.dtype == torch.float64 else ((exact.view(torch.int32) + 2) & ~3).view(torch.float32)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradient * result


def exp(x: Tensor) -> Tensor:
    """exp, with a relative error of up to 2^-22 in float32: the documented one of the instruction on GPUs."""
    result: Tensor = _Exp.apply(x)
    return result


def log_decay(A: Tensor, d: Tensor) -> Tensor:
    """A * d; a step of 0 decays nothing, even at A = -inf. The slope in d is A there, too, where A is finite."""
    return torch.where((d == 0) & A.isinf(), 0, A) * d


def sums_between(g: Tensor) -> Tensor:
    """[i, j] is the sum of the g of a chunk's tokens after j, up to i; 0 where j comes after i."""
    rows = [torch.zeros_like(g)]
    for i in range(1, len(g)):
        rows.append(torch.cat([rows[-1][:i] + g[i], rows[-1][i:]]))
    return torch.stack(rows)
