"""The RMS norm in torch's own functions, for mamba_mixing, for the layers, and as the reference of rms_norm."""

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis: in float32 at least, rounded once."""
    return normalised(x, weight, eps=eps)[0].to(x.dtype)


def normalised(
    x: Tensor,
    weight: Tensor | None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    sigmoid_gate: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what `mamba_ops.rms_norm` writes to `out` and to `total`, before either is rounded.

    It is in float32, or wider; without `residual` the total is `x` itself.
    """
    total = x if residual is None else wide_sum(x, residual)
    factor = None if gate is None else torch.sigmoid(upcast(gate)) if sigmoid_gate else functional.silu(upcast(gate))
    # x is promoted while it is multiplied: no copy of it
    h = upcast(total) if factor is None or norm_before_gate else total * factor
    h = grouped_rms_norm(h, weight, groups, eps)
    return h if factor is None or not norm_before_gate else h * factor, total


def grouped_rms_norm(h: Tensor, weight: Tensor | None, groups: int, eps: float) -> Tensor:
    """Return groups of consecutive channels normalised separately, times the weight, in the dtype of `h`."""
    weight = None if weight is None else weight.to(h.dtype)
    if groups == 1:  # one kernel on a GPU
        return functional.rms_norm(h, h.shape[-1:], weight, eps)
    h = h.unflatten(-1, (groups, -1))
    h = functional.rms_norm(h, h.shape[-1:], eps=eps).flatten(-2)
    return h if weight is None else h * weight


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor as float32, the dtype of sums; float64 stays as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wide_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y in float32 at least. Where y is that wide, x is promoted while it is added: no copy of it."""
    return (x if y.dtype in (torch.float32, torch.float64) else upcast(x)) + y
