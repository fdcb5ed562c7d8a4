"""The RMS norm, for mamba_mixing and for the layers."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis: in float32 at least, rounded once."""
    upcast = torch.promote_types(x.dtype, torch.float32)
    return functional.rms_norm(x.to(upcast), x.shape[-1:], weight.to(upcast), eps).to(x.dtype)
