"""The norms of mamba_ssm, with residuals, dropout and gates, and its gated activation, in torch's own functions.

RMS norms are one call of `rms_norm` where it has a kernel and takes them (`is_one_pass`). All are computed in float32
(float64 for float64 inputs), rounded once, and differentiable.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, rms_norm, silu

from mamba_ops import ops
from mamba_ops.compat.arguments import floating, only
from mamba_ops.layers.norms import is_one_pass, upcast, wide_sum
from mamba_ops.layers.norms import rms_norm as gated_norm
from mamba_ops.registry import answering

# -- mamba_ssm.ops.triton.layer_norm ----------------------------------------------------------------------------------


@answering
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Add what comes together, and normalise the sum: drop(x * rowscale) + drop(x1) + residual.

    Args:
        x, x1, residual: `(..., size)`.
        weight, bias, weight1, bias1: `(size,)`; with `weight1` the sum is normalised a second time, by that.
        eps: added to the variance.
        dropout_p: how likely an entry of x, and of x1, is zero.
        rowscale: `(...)`, not with `x1`.
        prenorm: whether to return the sum too, in the residual's dtype.
        residual_in_fp32: whether a sum without `residual` is float32.
        is_rms_norm: whether to divide by the root of the mean square, without taking the mean away.
        return_dropout_mask: whether to return, last, which entries of x and of x1 were kept.

    Returns:
        The normalised sum; then with `weight1` the second one, with `prenorm` the sum, and the two masks.
    """
    name = "layer_norm_fn"
    scales = {"weight": weight, "bias": bias, "weight1": weight1, "bias1": bias1}
    floating(name, x=x, residual=residual, x1=x1, **scales)
    if x1 is not None and rowscale is not None:
        raise ValueError(f"{name}: rowscale: got a tensor and x1, expected one of the two")
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    if (
        is_rms_norm
        and weight is not None
        and not any(t is not None for t in (bias, x1, weight1, bias1, rowscale))
        and dropout_p == 0
        and not return_dropout_mask
        and is_one_pass(x, weight, residual=residual)
    ):
        return one_pass(x, weight, residual=residual, kept=kept if prenorm else None, eps=eps)
    parts, masks = [], []
    for part, scale in ((x, rowscale), (x1, None)):
        mask = None
        if part is not None:
            h = part if scale is None else upcast(part) * scale.unsqueeze(-1)
            if dropout_p > 0:
                h = upcast(h)
                mask = torch.rand(h.shape, device=h.device) > dropout_p
                h = h * mask / (1 - dropout_p)
            parts.append(h)
        masks.append(mask)
    parts += [] if residual is None else [residual]
    total = functools.reduce(wide_sum, parts[1:], parts[0])
    results: list[Tensor | None] = [
        normalised(upcast(total), w, b, eps, is_rms_norm).to(x.dtype)
        for w, b in ((weight, bias), (weight1, bias1))
        if w is not None
    ]
    if prenorm:
        results.append(total.to(kept))
    if return_dropout_mask:
        results += masks
    only = results[0]
    return tuple(results) if len(results) > 1 or only is None else only


def one_pass(
    x: Tensor, weight: Tensor | None, *, residual: Tensor | None, kept: torch.dtype | None, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Return a norm in one call of the op, and with `kept` the sum in that dtype, too."""
    if kept is None or (residual is None and kept == x.dtype):
        out = ops.rms_norm(x, weight, residual=residual, **options)
        return out if kept is None else (out, x)
    total = torch.empty(x.shape, dtype=kept, device=x.device)
    return ops.rms_norm(x, weight, residual=residual, total=total, **options), total


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Do what `layer_norm_fn` does with `is_rms_norm`."""
    terms = (x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale)
    return layer_norm_fn(*terms, prenorm, residual_in_fp32, True, return_dropout_mask)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Do what `layer_norm_fn` does, and project what comes of it with `linear_weight`, `(out, size)`."""
    options: dict[str, Any] = {"residual_in_fp32": residual_in_fp32, "is_rms_norm": is_rms_norm}
    result = layer_norm_fn(x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm, **options)
    out = linear(only(result).to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, *result[1:]) if isinstance(result, tuple) else out


class RMSNorm(nn.Module):
    """`rms_norm_fn` with a weight as parameter; `bias` is None."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """Normalise `x + residual` over the last axis."""
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        options: dict[str, Any] = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32, "dropout_p": dropout_p}
        return rms_norm_fn(x, self.weight, None, residual=residual, eps=self.eps, **options)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
    *,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Do what `layer_norm_fn` does; which entries are kept may be given. `upcast` is of no effect: it always is."""
    if dropout_p > 0 and dropout_mask is not None:
        x = x * dropout_mask / (1 - dropout_p)
        x1 = None if x1 is None else x1 * (1 if dropout_mask1 is None else dropout_mask1) / (1 - dropout_p)
        dropout_p = 0.0
    tensors = (x, weight, bias, residual, x1, weight1, bias1)
    return layer_norm_fn(*tensors, eps, dropout_p, rowscale, prenorm, is_rms_norm=is_rms_norm)


def rms_norm_ref(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
    """Do what `layer_norm_ref` does, dividing by the root of the mean square."""
    return layer_norm_ref(*args, **kwargs, is_rms_norm=True)


# -- mamba_ssm.ops.triton.layernorm_gated -----------------------------------------------------------------------------


@answering
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise groups of channels, with a gate before or after it.

    Args:
        x, z: `(..., size)`; the gate is silu(z).
        weight, bias: `(size,)`.
        eps: added to the variance.
        group_size: consecutive channels that are normalised together; None: all.
        norm_before_gate: whether the norm comes first.
        is_rms_norm: as for `layer_norm_fn`.
    """
    floating("layernorm_fn", x=x, z=z, weight=weight, bias=bias)
    size = x.shape[-1]
    if group_size is not None and size % group_size:
        raise ValueError(f"layernorm_fn: group_size: got {group_size}, expected a divisor of {size}, the channels of x")
    if is_rms_norm and bias is None:
        groups = 1 if group_size is None else size // group_size
        return gated_norm(x, weight, eps, gate=z, groups=groups, norm_before_gate=norm_before_gate)
    h = x if z is None or norm_before_gate else x * silu(upcast(z))  # promoted while it is multiplied: no copy of x
    h = normalised_groups(upcast(h), weight, bias, eps, is_rms_norm, group_size)
    return (h * silu(upcast(z)) if z is not None and norm_before_gate else h).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Do what `layernorm_fn` does with `is_rms_norm`."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, True)


def rms_norm_gated_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """Do what `rmsnorm_fn` does; `upcast` is of no effect: it always is."""
    return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)


class LayerNormGated(nn.Module):
    """`layernorm_fn` with weight and bias as parameters; mamba_ssm's `layernorm_gated.LayerNorm`."""

    is_rms_norm = False
    bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones, and the bias to zeros."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise `x`, with the gate `z` where there is one."""
        options = (z, self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm)
        return layernorm_fn(x, self.weight, self.bias, *options)


class RMSNormGated(LayerNormGated):
    """`rmsnorm_fn` with a weight as parameter; mamba_ssm's `layernorm_gated.RMSNorm`."""

    is_rms_norm = True


# -- mamba_ssm.ops.triton.k_activations -------------------------------------------------------------------------------


@answering
def swiglu(xy: Tensor) -> Tensor:
    """Return silu(x) * y for `(..., 2 * size)`, x first."""
    x, y = upcast(xy).chunk(2, dim=-1)
    return (silu(x) * y).to(xy.dtype)


def normalised_groups(
    h: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool, group_size: int | None
) -> Tensor:
    """Return consecutive channels normalised together, a group or all, in the dtype of `h`."""
    if group_size in (None, h.shape[-1]):
        return normalised(h, weight, bias, eps, is_rms_norm)
    groups = h.unflatten(-1, (-1, group_size))
    h = normalised(groups, None, None, eps, is_rms_norm).flatten(-2) * upcast(weight)
    return h if bias is None else h + upcast(bias)


def normalised(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    """Return a tensor normalised over its last axis, in its own dtype."""
    size = h.shape[-1:]
    weight, bias = (None if t is None else t.to(h.dtype) for t in (weight, bias))
    if not is_rms_norm:
        return layer_norm(h, size, weight, bias, eps)
    h = rms_norm(h, size, weight, eps)
    return h if bias is None else h + bias
