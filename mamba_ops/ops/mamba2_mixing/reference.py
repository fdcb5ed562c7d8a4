"""The plain-torch kernel of mamba2_mixing: its reference, which runs on any device."""

import math

import torch
from torch.nn import functional

from mamba_ops.ops._common.mixing import (
    Call,
    PlanTensors,
    Rows,
    batch_of,
    by_head,
    each_kind,
    like_convolved,
    require_window,
)
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.mamba2_mixing.op import Arguments
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan
from mamba_ops.ops.selective_state_update import selective_state_update


def mamba2_mixing(call: Arguments) -> None:
    plan = PlanTensors.of(call)
    batch = batch_of("mamba_ops::mamba2_mixing", plan, call.projected.shape[0], call.null_slot)
    require_window("mamba_ops::mamba2_mixing", plan, call.conv_state, call.conv_weight)
    inner, bc = call.heads * call.head_dim, call.groups * call.dstate
    _, mixed, dt = call.projected.split_with_sizes([inner, inner + 2 * bc, call.heads], dim=-1)
    sizes = (call.heads, call.head_dim), (call.groups, call.dstate), (call.groups, call.dstate)

    def read(rows: Rows, convolve: Call, scan: Call) -> None:
        convolved = convolve(
            rows.of(mixed), call.conv_weight, call.conv_bias, conv_state=call.conv_state, **rows.options
        )
        x, B, C = by_head(like_convolved(rows.of(mixed)) if convolved is None else convolved, *sizes)
        scan(
            x,
            rows.of(dt),
            call.A,
            B,
            C,
            call.chunk_size,
            D=call.D,
            dt_bias=call.dt_bias,
            dt_softplus=True,
            dt_min=call.dt_min,
            dt_max=call.dt_max,
            num_computed_tokens=batch.num_computed_tokens,
            ssm_state=call.ssm_state,
            out=rows.of(call.output),
            **rows.options,
        )

    def step(rows: Rows, convolve: Call, update: Call) -> None:
        convolved = convolve(rows.of(mixed), call.conv_state, call.conv_weight, call.conv_bias, **rows.options)
        x, B, C = by_head(like_convolved(rows.of(mixed)) if convolved is None else convolved, *sizes)
        d, bias = rows.of(dt), call.dt_bias
        if limited := call.dt_min > 0 or call.dt_max < math.inf:  # the update has no limits of its own
            compute = torch.promote_types(d.dtype, torch.float32)
            d = functional.softplus(d.to(compute) + call.dt_bias.to(compute)).clamp(call.dt_min, call.dt_max)
        update(
            call.ssm_state,
            x,
            d,
            call.A,
            B,
            C,
            D=call.D,
            dt_bias=None if limited else bias,
            dt_softplus=not limited,
            out=rows.of(call.output),
            **rows.options,
        )

    each_kind(batch, step, (causal_conv1d_update, selective_state_update), read, (causal_conv1d, mamba_chunk_scan))
    batch.clear_rest(call.output)
