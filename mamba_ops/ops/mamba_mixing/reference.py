"""The plain-torch kernel of mamba_mixing: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common import norms
from mamba_ops.ops._common.mixing import Batch, batch_of, require_window
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.mamba_mixing.op import Arguments
from mamba_ops.ops.rms_norm import rms_norm
from mamba_ops.ops.rms_norm.op import is_one_pass
from mamba_ops.ops.selective_scan import selective_scan
from mamba_ops.ops.selective_state_update import selective_state_update
from mamba_ops.registry import has_explicit_backend


def mamba_mixing(call: Arguments) -> None:
    batch = batch_of("mamba_ops::mamba_mixing", call, call.projected.shape[0])
    require_window("mamba_ops::mamba_mixing", call)
    (inner, dstate), rank = call.A.shape, call.dt_proj_weight.shape[1]
    x, z = call.projected.split([inner, inner], dim=-1)
    mixed, dt = (x.new_empty(batch.tokens, inner) for _ in range(2))
    low = x.new_empty(batch.tokens, rank + 2 * dstate)
    parts = low_dt, B, C = low.split([rank, dstate, dstate], dim=-1)

    def convolve(batch: Batch) -> None:
        for rows, op in batch.kinds(causal_conv1d_update, causal_conv1d):
            rows.convolve(op, call, x, out=mixed)

    def scan(batch: Batch) -> None:
        for kind, op in batch.kinds(selective_state_update, selective_scan):
            rows, states, more = kind, None, {"ssm_state": call.ssm_state, "state_scale": call.state_scale}
            if kind is not batch.decodes:
                rows, states = kind.widened(call, x)
                more = {"ssm_state": states.states}
            rows.bind(op)(
                x=rows.of(mixed),
                dt=rows.of(dt),
                A=call.A,
                B=rows.of(B),
                C=rows.of(C),
                D=call.D,
                z=rows.of(z),
                dt_bias=call.dt_proj_bias,
                dt_softplus=True,
                out=rows.of(call.output),
                **more,
            )
            if states is not None:
                states.keep()

    if has_explicit_backend(causal_conv1d_update, causal_conv1d, selective_state_update, selective_scan):
        convolve(batch.check_only())
        scan(batch.check_only())
    convolve(batch)
    torch.mm(mixed, call.x_proj_weight.t(), out=low)
    for part, weight in zip(parts, (call.dt_norm_weight, call.B_norm_weight, call.C_norm_weight), strict=True):
        if weight is not None:
            part.copy_(_normalised(part, weight, call.norm_eps))
    torch.mm(low_dt, call.dt_proj_weight.t(), out=dt)
    scan(batch)
    batch.clear_rest(call.output)


def _normalised(part: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of layers without a plan, by the same kernel."""
    if is_one_pass(part, weight):
        return rms_norm.call_undispatched(part, weight, eps=eps)  # type: ignore[no-any-return]
    return norms.rms_norm(part, weight, eps)
