"""The plain-torch kernel of gated_delta_rule_update: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.decay import finite_rates
from mamba_ops.ops._common.delta_rule_update import advance, sigmoid, softplus
from mamba_ops.ops.gated_delta_rule_update.op import Arguments


def delta_rule_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and beta, like `a`, from what a layer projects, in float32 at least."""
    upcast = torch.promote_types(a.dtype, torch.float32)
    d = softplus(a.to(upcast) + dt_bias.to(upcast))
    return finite_rates(-torch.exp(A_log.to(upcast))) * d, sigmoid(b.to(upcast))


def gated_delta_rule_update(call: Arguments) -> None:
    advance(call, delta_rule_gates)
