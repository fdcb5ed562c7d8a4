"""The plain-torch kernel of mamba_mixing: its reference, which runs on any device."""

from typing import Any

import torch

from mamba_ops.ops._common.mixing import (
    Call,
    PlanTensors,
    batch_of,
    require_window,
)
from mamba_ops.ops._common.norms import rms_norm
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.mamba_mixing.op import Arguments
from mamba_ops.ops.selective_scan import selective_scan
from mamba_ops.ops.selective_state_update import selective_state_update
from mamba_ops.registry import has_explicit_backend


def mamba_mixing(call: Arguments) -> None:
    plan = PlanTensors.of(call)
    batch = batch_of("mamba_ops::mamba_mixing", plan, call.projected.shape[0], call.null_slot)
    require_window("mamba_ops::mamba_mixing", plan, call.conv_state, call.conv_weight)
    (inner, dstate), rank = call.A.shape, call.dt_proj_weight.shape[1]
    x, z = call.projected.split([inner, inner], dim=-1)
    mixed, delta = (x.new_empty(batch.tokens, inner) for _ in range(2))
    low = x.new_empty(batch.tokens, rank + 2 * dstate)
    parts = dt, B, C = low.split([rank, dstate, dstate], dim=-1)
    decodes, prefills = batch.decodes, batch.prefills

    def convolve(step: Call, read: Call) -> None:
        if decodes is not None:
            out = decodes.of(mixed)
            step(decodes.of(x), call.conv_state, call.conv_weight, call.conv_bias, out=out, **decodes.options)
        if prefills is not None:
            options = {"conv_state": call.conv_state, **prefills.options}
            read(prefills.of(x), call.conv_weight, call.conv_bias, out=prefills.of(mixed), **options)

    def scan(step: Call, read: Call) -> None:
        options: dict[str, Any]
        if decodes is not None:
            options = {
                "D": call.D,
                "z": decodes.of(z),
                "dt_bias": call.dt_proj_bias,
                "dt_softplus": True,
                **decodes.options,
            }
            u, d, b, c, out = map(decodes.of, (mixed, delta, B, C, call.output))
            step(call.ssm_state, u, d, call.A, b, c, out=out, **options)
        if prefills is not None:
            options = {"D": call.D, "z": prefills.of(z), "dt_bias": call.dt_proj_bias, "dt_softplus": True}
            u, d, b, c, out = map(prefills.of, (mixed, delta, B, C, call.output))
            read(u, d, call.A, b, c, ssm_state=call.ssm_state, out=out, **options, **prefills.options)

    convolutions, scans = (causal_conv1d_update, causal_conv1d), (selective_state_update, selective_scan)
    if has_explicit_backend(*convolutions, *scans):
        convolve(*(op.check_supported for op in convolutions))
        scan(*(op.check_supported for op in scans))
    convolve(*(op.call_undispatched for op in convolutions))
    torch.mm(mixed, call.x_proj_weight.t(), out=low)
    for part, weight in zip(parts, (call.dt_norm_weight, call.B_norm_weight, call.C_norm_weight), strict=True):
        if weight is not None:
            part.copy_(rms_norm(part, weight, call.norm_eps))
    torch.mm(dt, call.dt_proj_weight.t(), out=delta)
    scan(*(op.call_undispatched for op in scans))
    batch.clear_rest(call.output)
