"""The exponential that kernels have."""

import torch
from torch import Tensor


def exp(x: Tensor) -> Tensor:
    """exp, with a relative error of up to 2^-22 in float32: the documented one of the instruction on GPUs."""
    exact = torch.exp(x)
    return exact if x.dtype == torch.float64 else ((exact.view(torch.int32) + 2) & ~3).view(torch.float32)


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        result = exp(x)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return gradient * result


def differentiable_exp(x: Tensor) -> Tensor:
    """`exp`, with the gradient that an exponential has."""
    result: Tensor = _Exp.apply(x)
    return result
