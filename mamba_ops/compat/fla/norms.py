"""The norms of flash-linear-attention 0.6 that stand beside the gated delta rule, in torch's own functions.

RMS norms are one call of `rms_norm` where it has a kernel and takes them (`is_one_pass`). All are computed in float32
(float64 for float64 inputs), rounded once, and differentiable.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mamba_ops.compat.arguments import floating, floating_dtypes, numbers
from mamba_ops.compat.mamba_ssm import norms as mamba_norms
from mamba_ops.compat.mamba_ssm.norms import layer_norm_fn, normalised, one_pass
from mamba_ops.layers.norms import is_one_pass, upcast, wide_sum
from mamba_ops.registry import answering

GATES: dict[str, Callable[[Tensor], Tensor]] = {"swish": silu, "silu": silu, "sigmoid": torch.sigmoid}


@answering
def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """Return x / sqrt(sum(x^2) + eps) over the last axis, in `output_dtype`, or x's."""
    floating("l2norm", x=x)
    numbers("l2norm", eps=eps)
    floating_dtypes("l2norm", output_dtype=output_dtype)
    h = upcast(x)
    return (h * torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)).to(
        x.dtype if output_dtype is None else output_dtype
    )


class L2Norm(nn.Module):
    """`l2norm`."""

    def __init__(self, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps, self.output_dtype = eps, output_dtype

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` over the last axis."""
        return l2norm(x, self.eps, self.output_dtype)


@answering
def layer_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
    *,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise x + residual over the last axis, and gate it; with `prenorm` also return the sum.

    Args:
        x, residual: `(..., size)`.
        g: as many numbers as x: the gate.
        weight, bias: `(size,)`, or None.
        activation: of the gate: "swish", "silu" or "sigmoid".
        residual_in_fp32: whether a sum without `residual` is float32.
        eps: added to the variance.
        is_rms_norm: whether to divide by the root of the mean square, without taking the mean away.
    """
    name = "rms_norm_gated" if is_rms_norm else "layer_norm_gated"
    if activation not in GATES:
        raise ValueError(f"{name}: activation: got {activation!r}, expected {', '.join(map(repr, GATES))}")
    floating(name, x=x, g=g, residual=residual, weight=weight, bias=bias)
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    if is_rms_norm and bias is None and is_one_pass(x, weight, gate := g.reshape(x.shape), residual):
        options: dict[str, Any] = {"gate": gate, "sigmoid_gate": activation == "sigmoid", "norm_before_gate": True}
        return one_pass(x, weight, residual=residual, kept=kept if prenorm else None, eps=eps, **options)
    total = upcast(x) if residual is None else wide_sum(x, residual)
    y = normalised(total, weight, bias, eps, is_rms_norm) * GATES[activation](upcast(g.reshape(x.shape)))
    return (y.to(x.dtype), total.to(kept)) if prenorm else y.to(x.dtype)


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Do what `layer_norm_gated` does with `is_rms_norm`."""
    options = (activation, residual, prenorm, residual_in_fp32, eps)
    return layer_norm_gated(x, g, weight, bias, *options, is_rms_norm=True)


class _Affine(nn.Module):
    """What fla's norms have as parameters."""

    weight: Tensor | None
    bias: Tensor | None

    def _make_parameters(
        self, size: int, has_weight: bool, has_bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        for name, wanted in (("weight", has_weight), ("bias", has_weight and has_bias)):
            new = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, new)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones, and the bias to zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class FusedLayerNormGated(_Affine):
    """`layer_norm_gated` with weight and bias as parameters, and fla's constructor."""

    is_rms_norm = False

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        activation: str = "swish",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in GATES:
            expected = ", ".join(map(repr, GATES))
            raise ValueError(f"{type(self).__name__}: activation: got {activation!r}, expected {expected}")
        self.hidden_size, self.elementwise_affine, self.eps, self.activation = (
            hidden_size, elementwise_affine, eps, activation
        )  # fmt: skip
        self._make_parameters(hidden_size, elementwise_affine, bias, device, dtype)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.hidden_size}, eps={self.eps}, activation={self.activation}"

    def forward(
        self,
        x: Tensor,
        g: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise `x + residual`, and gate it with `g`."""
        options = (self.activation, residual, prenorm, residual_in_fp32, self.eps)
        return layer_norm_gated(x, g, self.weight, self.bias, *options, is_rms_norm=self.is_rms_norm)


class FusedRMSNormGated(FusedLayerNormGated):
    """`rms_norm_gated` with a weight as parameter, and fla's constructor; `bias` is None."""

    is_rms_norm = True

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, False, activation, eps, device, dtype)


class FusedRMSNormSwishGate(FusedRMSNormGated):
    """`FusedRMSNormGated` whose gate is silu, under its older name."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, elementwise_affine, eps, "swish", device, dtype)


@answering
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """Normalise x + residual over the last axis; with `prenorm` also return the sum."""
    options: dict[str, Any] = {"residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    return layer_norm_fn(x, weight, bias, residual, eps=eps, prenorm=prenorm, **options)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    """Do what `layer_norm` does with `is_rms_norm`."""
    return layer_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, True)


class RMSNorm(_Affine):
    """`rms_norm` with weight and bias as parameters, and fla's constructor."""

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        self._make_parameters(hidden_size, elementwise_affine, bias, device, dtype)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """Normalise `x + residual` over the last axis."""
        weight = x.new_ones(self.hidden_size) if self.weight is None else self.weight
        return rms_norm(x, weight, self.bias, residual, self.eps, prenorm, residual_in_fp32)


class RMSNormGated(mamba_norms.RMSNormGated):
    """mamba_ssm's norm, whose gate comes first by default; fla's `layernorm_gated.RMSNormGated`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, group_size, norm_before_gate, device, dtype)
