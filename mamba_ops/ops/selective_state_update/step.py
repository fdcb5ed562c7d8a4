"""The usual call of selective_state_update: row i has slot i and one token, and states are rounded to the nearest.

It has no slots to look up and no rows to choose, so it takes a third of the time of the reference for all calls.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.ops._common.decay import finite_rates

if TYPE_CHECKING:
    from mamba_ops.ops.selective_state_update.op import Arguments


def is_step(call: "Arguments") -> bool:
    return (
        call.slots is None
        and call.write_slots is None
        and call.cu_seqlens is None
        and call.rounding_seed is None
        and call.state_scale is None
        and call.x.dim() < call.ssm_state.dim()
    )


def step(call: "Arguments", compute: torch.dtype) -> None:
    """Advance all states where they are, if they are of the dtype that is computed in."""
    if call.x.shape[0] == 0:
        return
    cache = call.ssm_state[: call.x.shape[0]]
    heads = call.x.shape[1] if cache.dim() == 4 else 1
    groups = call.B.shape[1] if cache.dim() == 4 else 1
    by_group = (groups, heads // groups)

    def tokens(given: Tensor) -> Tensor:
        """An activation as (n, groups, heads of a group, 1 or dim)."""
        return given.to(compute).reshape(given.shape[0], *by_group, -1)

    def weights(given: Tensor) -> Tensor:
        """A parameter by head or channel as (groups, heads of a group, 1 or dim)."""
        return given.to(compute).reshape(*by_group, -1)

    x, d = tokens(call.x), tokens(call.dt)
    B, C = (given.to(compute).reshape(given.shape[0], groups, 1, 1, -1) for given in (call.B, call.C))
    if call.dt_bias is not None:
        d = d + weights(call.dt_bias)
    if call.dt_softplus:  # not torch's softplus and sigmoid: on CPU their last bits depend on where an element stands
        d = torch.where(d > 20, d, torch.exp(d).log1p_())
    rates = finite_rates(call.A.to(compute))
    by_channel = call.A.dim() == cache.dim() - 1
    rates = rates.reshape(*by_group, *(cache.shape[-2:] if by_channel else (1, 1)))

    states = cache.to(compute).unflatten(-3, by_group) if cache.dim() == 4 else cache.to(compute)[:, None, None]
    states.mul_(torch.mul(d.unsqueeze(-1), rates).exp_())
    pushed = torch.mul((d * x).unsqueeze(-1), B)
    states.add_(pushed)
    y = torch.mul(states, C, out=pushed).sum(-1)
    if states.dtype != cache.dtype:
        cache.copy_(states.view(cache.shape))
    if call.D is not None:
        y += weights(call.D) * x
    if call.z is not None:
        gate = tokens(call.z)
        y *= gate / torch.neg(gate).exp_().add_(1)
    call.output.copy_(y.view(call.output.shape))
