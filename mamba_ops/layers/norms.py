"""RMS norms with a gate, and without one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.ops._common.norms import rms_norm


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` with a weight as parameter."""

    def __init__(
        self,
        size: int,
        *,
        groups: int = 1,
        eps: float = 1e-5,
        norm_before_gate: bool = False,
        activation: str = "silu",
        **new: Any,
    ) -> None:
        super().__init__()
        self.groups, self.eps, self.norm_before_gate, self.activation = groups, eps, norm_before_gate, activation
        self.weight = nn.Parameter(torch.empty(size, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Gate `x` and normalise it."""
        return self.norm(x, gate, self.weight)

    def norm(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        """Do it with this weight."""
        options: dict[str, Any] = {"norm_before_gate": self.norm_before_gate, "activation": self.activation}
        return gated_rms_norm(x, gate, weight, groups=self.groups, eps=self.eps, **options)

    def extra_repr(self) -> str:
        """Return the sizes."""
        first = ", norm_before_gate=True" if self.norm_before_gate else ""
        first += "" if self.activation == "silu" else f", activation={self.activation!r}"
        return f"{self.weight.shape[0]}, groups={self.groups}, eps={self.eps}{first}"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; where it is not `weighted`, the weight is a buffer of ones."""

    def __init__(self, size: int, *, eps: float, weighted: bool = True, **new: Any) -> None:
        super().__init__()
        self.eps = eps
        ones = torch.ones(size, **new)
        if weighted:
            self.weight = nn.Parameter(ones)
        else:
            self.register_buffer("weight", ones, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` over its last axis."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    activation: str = "silu",
) -> Tensor:
    """Return rms_norm(x * silu(gate)) * weight, or rms_norm(x) * weight * silu(gate) with norm_before_gate.

    Computed in float32 (float64 for float64 `x`) and rounded once, to the dtype of `x`.

    Args:
        x, gate: `(..., size)`.
        weight: `(size,)`.
        groups: how many groups of consecutive channels; each is normalised separately.
        eps: added to the mean square.
        norm_before_gate: whether the norm comes first.
        activation: of the gate: "silu" or "sigmoid".
    """
    factor = torch.sigmoid(upcast(gate)) if activation == "sigmoid" else functional.silu(upcast(gate))
    h = upcast(x) if norm_before_gate else x * factor  # x is promoted while it is multiplied: no copy of it
    h = grouped_rms_norm(h, weight, groups, eps)
    return (h * factor if norm_before_gate else h).to(x.dtype)


def grouped_rms_norm(h: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return groups of consecutive channels normalised separately, times the weight, in the dtype of `h`."""
    if groups == 1:  # one kernel on a GPU
        return functional.rms_norm(h, h.shape[-1:], weight.to(h.dtype), eps)
    h = h.unflatten(-1, (groups, -1))
    return functional.rms_norm(h, h.shape[-1:], eps=eps).flatten(-2) * weight.to(h.dtype)


def upcast(tensor: Tensor) -> Tensor:
    """Return a tensor as float32, the dtype of sums; float64 stays as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wide_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y in float32 at least. Where y is that wide, x is promoted while it is added: no copy of it."""
    return (x if y.dtype in (torch.float32, torch.float64) else upcast(x)) + y
