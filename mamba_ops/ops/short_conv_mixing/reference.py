"""The plain-torch kernel of short_conv_mixing: its reference, which runs on any device."""

import torch

from mamba_ops.ops._common.mixing import Batch, batch_of, require_window
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.short_conv_mixing.op import Arguments
from mamba_ops.registry import has_explicit_backend


def short_conv_mixing(call: Arguments) -> None:
    batch = batch_of("mamba_ops::short_conv_mixing", call, call.projected.shape[0])
    require_window("mamba_ops::short_conv_mixing", call)
    B, C, x = call.projected[: batch.tokens].chunk(3, dim=-1)
    mixed = B * x
    y = mixed.new_empty(mixed.shape)

    def convolve(batch: Batch) -> None:
        for rows, op in batch.kinds(causal_conv1d_update, causal_conv1d):
            rows.convolve(op, call, mixed, y, silu=False)

    if has_explicit_backend(causal_conv1d_update, causal_conv1d):
        convolve(batch.check_only())
    convolve(batch)
    out = call.output[: batch.tokens]
    torch.mul(C.to(torch.promote_types(C.dtype, out.dtype)), y, out=out)
    out.masked_fill_(y == 0, 0)  # a padding row's tokens may be anything, NaN too
    batch.clear_rest(call.output)
