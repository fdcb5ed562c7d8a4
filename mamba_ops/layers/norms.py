"""RMS norms with a gate, and without one: one call of `rms_norm` where it has a kernel, else torch's own functions."""

from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops import ops
from mamba_ops.ops._common.norms import normalised
from mamba_ops.ops._common.norms import upcast as upcast
from mamba_ops.ops._common.norms import wide_sum as wide_sum
from mamba_ops.ops.rms_norm.op import is_one_pass as is_one_pass


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
    options: dict[str, Any] = {"norm_before_gate": norm_before_gate, "sigmoid_gate": activation == "sigmoid"}
    return rms_norm(x, weight, eps, gate=gate, groups=groups, **options)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    gate: Tensor | None = None,
    groups: int = 1,
    norm_before_gate: bool = False,
    sigmoid_gate: bool = False,
) -> Tensor:
    """Do what `mamba_ops.rms_norm` does: by the op where it has a kernel, else in torch's functions."""
    options: dict[str, Any] = {"gate": gate, "groups": groups, "eps": eps}
    options |= {"norm_before_gate": norm_before_gate, "sigmoid_gate": sigmoid_gate}
    if is_one_pass(x, weight, gate, groups=groups):
        return ops.rms_norm(x, weight, **options)
    return normalised(x, weight, **options)[0].to(x.dtype)
