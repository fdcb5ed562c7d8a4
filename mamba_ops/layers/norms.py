"""RMS norms with a gate, and without one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` with a weight of its own."""

    def __init__(self, size: int, *, groups: int = 1, eps: float = 1e-5, **new: Any) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(size, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate `x` and normalise it."""
        return gated_rms_norm(x, gate, self.weight, groups=self.groups, eps=self.eps)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.weight.shape[0]}, groups={self.groups}, eps={self.eps}"


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5, norm_before_gate: bool = False
) -> Tensor:
    """Return rms_norm(x * silu(gate)) * weight, or rms_norm(x) * weight * silu(gate) where the norm comes first.

    Computed in float32 (float64 for float64 `x`) and rounded once, to the dtype of `x`.

    Args:
        x, gate: `(..., size)`.
        weight: `(size,)`.
        groups: of consecutive channels; each is normalised by itself.
        eps: added to the mean square.
        norm_before_gate: whether the norm comes first.
    """
    h, opened = wide(x), functional.silu(wide(gate))
    if not norm_before_gate:
        h = h * opened
    h = h.unflatten(-1, (groups, -1))
    h = functional.rms_norm(h, h.shape[-1:], eps=eps).flatten(-2) * wide(weight)
    return (h * opened if norm_before_gate else h).to(x.dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype that sums are made in: float32, or float64 as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
