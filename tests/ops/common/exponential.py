"""The exponential that kernels have."""

import torch
from torch import Tensor


def exp(x: Tensor) -> Tensor:
    """exp, with a relative error of up to 2^-22 in float32: the documented one of the instruction on GPUs."""
    exact = torch.exp(x)
    return exact if x.dtype == torch.float64 else ((exact.view(torch.int32) + 2) & ~3).view(torch.float32)
