"""The oracle of rms_norm: one token and one group at a time, written from the formulas."""

import itertools

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    sigmoid_gate: bool = False,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Return what the op leaves in `out` and in `total` (None without), both new tensors; the arguments stay as they
    are.

    Everything is computed in `dtype` and rounded once to the dtype of `out` (of `x` without it) and of `total`.
    """
    output = torch.empty_like(x) if out is None else out.clone()
    summed = None if total is None else total.clone()
    size = x.shape[-1] // groups
    for place in itertools.product(*map(range, x.shape[:-1])):
        h = x[place].to(dtype)
        if residual is not None:
            h = h + residual[place].to(dtype)
        if summed is not None:
            summed[place] = h.to(summed.dtype)
        factor = torch.ones_like(h)
        if gate is not None:
            factor = 1 / (1 + torch.exp(-gate[place].to(dtype)))
            if not sigmoid_gate:
                factor = factor * gate[place].to(dtype)
        if not norm_before_gate:
            h = h * factor
        for first in range(0, x.shape[-1], size):
            group = slice(first, first + size)
            y = h[group] / torch.sqrt((h[group] * h[group]).sum() / size + eps)
            if weight is not None:
                y = y * weight[group].to(dtype)
            if norm_before_gate:
                y = y * factor[group]
            output[(*place, group)] = y.to(output.dtype)
    return output, summed
