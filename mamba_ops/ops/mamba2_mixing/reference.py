"""The plain-torch kernel of mamba2_mixing: its reference, which runs on any device."""

import torch

from mamba_ops.ops._common.delta_rule_update import softplus
from mamba_ops.ops._common.mixing import Batch, batch_of, by_head, require_window
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.mamba2_mixing.op import Arguments
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan
from mamba_ops.ops.selective_state_update import selective_state_update
from mamba_ops.registry import has_explicit_backend
from mamba_ops.registry.codegen import LARGEST


def mamba2_mixing(call: Arguments) -> None:
    batch = batch_of("mamba_ops::mamba2_mixing", call, call.projected.shape[0])
    require_window("mamba_ops::mamba2_mixing", call)
    inner, bc = call.heads * call.head_dim, call.groups * call.dstate
    _, mixed, dt = call.projected.split_with_sizes([inner, inner + 2 * bc, call.heads], dim=-1)
    sizes = (call.heads, call.head_dim), (call.groups, call.dstate), (call.groups, call.dstate)

    def mix(batch: Batch) -> None:
        if (rows := batch.decodes) is not None:
            x, B, C = by_head(rows.convolve(causal_conv1d_update, call, mixed), *sizes)
            d = rows.of(dt)
            if limited := call.dt_min > 0 or call.dt_max < LARGEST:  # the update has no limits of its own
                upcast = torch.promote_types(d.dtype, torch.float32)
                d = softplus(d.to(upcast) + call.dt_bias.to(upcast)).clamp(call.dt_min, call.dt_max)
            rows.bind(selective_state_update)(
                call.ssm_state,
                x,
                d,
                call.A,
                B,
                C,
                D=call.D,
                dt_bias=None if limited else call.dt_bias,
                dt_softplus=not limited,
                state_scale=call.state_scale,
                out=rows.of(call.output),
            )
        for prefills in batch.prefills:
            rows, states = prefills.widened(call, mixed)
            x, B, C = by_head(prefills.convolve(causal_conv1d, call, mixed), *sizes)
            rows.bind(mamba_chunk_scan)(
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
                num_computed_tokens=rows.num_computed_tokens,
                ssm_state=states.states,
                out=rows.of(call.output),
            )
            states.keep()

    if has_explicit_backend(causal_conv1d_update, selective_state_update, causal_conv1d, mamba_chunk_scan):
        mix(batch.check_only())
    mix(batch)
    batch.clear_rest(call.output)
