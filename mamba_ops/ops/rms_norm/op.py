"""rms_norm: groups of channels over the root of their mean square, with a residual and a gate, in one pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.checking import check_tensors, shape_is
from mamba_ops.ops._namespace import mamba
from mamba_ops.registry import bad_argument, pays

MOST_CHANNELS = 16384
"""The most channels of a group that kernels take: one program has them all in registers."""


class Arguments(NamedTuple):
    """A call of rms_norm: what its checks and its kernels get."""

    x: Tensor
    weight: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    total: Tensor | None
    groups: int
    eps: float
    norm_before_gate: bool
    sigmoid_gate: bool
    output: Tensor


@mamba.op(
    mutates=("total", "out"),
    reference="mamba_ops.ops.rms_norm.reference:rms_norm",
    arguments=Arguments,
    gradients_in="mamba_ops.layers.gated_rms_norm",
)
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
) -> Tensor:
    """Add the residual, gate, divide groups of channels by the root of their mean square, and write `out`.

    Args:
        x: `(..., size)`.
        weight: `(size,)`. None: ones.
        gate: like `x`; it often is a slice of a wide projection.
        residual: like `x`.
        total: like `x`, in other memory: for x + residual, or without `residual` for x. Mutated.
        groups: how many groups of consecutive channels; each is normalised separately.
        eps: added to the mean square.
        norm_before_gate: whether the norm comes first, and the gate after it.
        sigmoid_gate: whether the gate goes through sigmoid; else through silu.
        out: like `x`, of any floating dtype, in other memory. Mutated.

    All floating dtypes mix; everything is computed in float32 (float64 for float64 `x`) and rounded once at each store.

    With act the gate's activation, 1 without a gate:

        h = x + residual
        total = h
        h = h * act(gate)                                                       unless norm_before_gate
        out = h / sqrt(mean(h^2 over the channels of a group) + eps) * weight
        out = out * act(gate)                                                   with norm_before_gate
    """


@rms_norm.allocate_output
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@rms_norm.validate
def _validate(call: Arguments) -> None:
    check_tensors(call, "x")
    if call.x.dim() == 0:
        raise bad_argument("x", got="shape ()", expected="(..., size)")
    size, shape = call.x.shape[-1], tuple(call.x.shape)
    shape_is("weight", call.weight, (size,), hint="its size is the last axis of x")
    for name in ("gate", "residual", "total"):
        shape_is(name, getattr(call, name), shape, hint="it is like x")
    shape_is("out", call.output, shape, hint="it is like x")
    if call.groups < 1 or size % call.groups:
        raise bad_argument("groups", got=call.groups, expected=f"a divisor of {size}, the channels of x")


def _unsupported(call: Arguments) -> str | None:
    """Takes no float64 tensor, and no group of more than 16,384 channels."""
    for name, tensor in call._asdict().items():
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
            return f"computes in float32, and {'out' if name == 'output' else name} is float64"
    channels = call.x.shape[-1] // call.groups
    if channels > MOST_CHANNELS:
        return f"takes groups of {MOST_CHANNELS} channels at most, and these have {channels}"
    return None


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def is_one_pass(
    x: Tensor, weight: Tensor | None, gate: Tensor | None = None, residual: Tensor | None = None, *, groups: int = 1
) -> bool:
    """Return whether a norm is to be one call of the op, and not the torch functions that do the same.

    It is where the op has a kernel that takes the tensors (see `registry.pays`), and each has the shape that it has
    here: the functions broadcast. It is asked before every norm, so nothing in it is done twice.
    """
    if not pays(rms_norm, x, weight, gate, residual) or x.dtype not in _DTYPES:
        return False
    shape = x.shape
    size = shape[-1]
    if weight is not None and (weight.dtype not in _DTYPES or weight.shape != (size,)):
        return False
    if gate is not None and (gate.dtype not in _DTYPES or gate.shape != shape):
        return False
    if residual is not None and (residual.dtype not in _DTYPES or residual.shape != shape):
        return False
    return size <= MOST_CHANNELS if groups == 1 else 0 < groups <= size <= groups * MOST_CHANNELS and size % groups == 0


triton.implements(rms_norm, "mamba_ops.ops.rms_norm.triton:rms_norm", unsupported=_unsupported)
