"""The plain-torch kernel of mamba3_state_update: its reference, composed of selective_state_update."""

import math

import torch
from torch import Tensor

from mamba_ops.ops._common.mamba3 import LEAST, advance, by_head, finished, near_zero, rotate
from mamba_ops.ops._common.slots import initial_states, row_ends, store_rows
from mamba_ops.ops.mamba3_state_update.op import Arguments
from mamba_ops.ops.selective_state_update import selective_state_update


def mamba3_state_update(call: Arguments) -> None:
    compute, (n, heads, _) = torch.promote_types(call.x.dtype, torch.float32), call.x.shape
    if not n:
        return
    x, dt, A, trap = (tensor.to(compute) for tensor in (call.x, call.dt, call.A, call.trap))
    none_empty = torch.zeros(n, dtype=torch.bool, device=x.device)
    ends = row_ends(call.slots, None, call.null_slot, none_empty, call.ssm_state)
    all_go_on = torch.ones_like(none_empty)
    angle, k_before, v_before = (
        initial_states(cache, ends, all_go_on, compute) for cache in (call.angle_state, call.k_state, call.v_state)
    )
    angle = near_zero(angle + math.pi * advance(call.angles.to(compute), dt))
    k = rotate(by_head(call.B, call.B_bias, heads, compute), angle)
    q = rotate(by_head(call.C, call.C_bias, heads, compute), angle)
    early = torch.sigmoid(trap)
    step = (-A * dt).clamp(min=LEAST)

    def two(before: Tensor, now: Tensor) -> Tensor:
        return torch.stack((before, now), dim=1)

    y = x.new_zeros(n, 2, *x.shape[1:])
    selective_state_update.call_undispatched(
        call.ssm_state,
        two(v_before * ((1 - early) * dt / LEAST).unsqueeze(-1), x * (early * dt / step).unsqueeze(-1)),
        two(torch.full_like(step, LEAST), step),
        step.new_full((heads,), -1),
        two(k_before, k),
        two(torch.zeros_like(q), q),
        slots=call.slots,
        null_slot=call.null_slot,
        out=y,
    )
    result = finished(y[:, 1], x, call.D, call.z)
    call.output.copy_(torch.where(ends.is_active.view(-1, 1, 1), result, 0))
    for cache, value in ((call.angle_state, angle), (call.k_state, k), (call.v_state, x)):
        store_rows(cache, ends.target, value, ends.stored)
