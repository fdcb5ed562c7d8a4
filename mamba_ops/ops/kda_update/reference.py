"""The plain-torch kernel of kda_update: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.decay import finite_rates
from mamba_ops.ops._common.delta_rule_update import advance, sigmoid, softplus
from mamba_ops.ops.kda_update.op import Arguments


def kda_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None) -> Tensor:
    """Return g, (..., v_heads, k_dim), from what a layer projects, in float32 at least.

    Args:
        a: (..., v_heads, k_dim).
        A_log: (v_heads,).
        dt_bias: (v_heads, k_dim).
        lower_bound: below 0, or None.
    """
    upcast = torch.promote_types(a.dtype, torch.float32)
    d, rate = a.to(upcast) + dt_bias.to(upcast), torch.exp(A_log.to(upcast)).unsqueeze(-1)
    if lower_bound is None:
        return finite_rates(-rate) * softplus(d)
    return lower_bound * sigmoid(-finite_rates(-rate) * d)


def kda_update(call: Arguments) -> None:
    def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        return kda_gate(a, A_log, dt_bias, call.lower_bound), sigmoid(b)

    advance(call, gates)
