"""The backend `example`: one kernel, for the usual decode step of the convolution, in plain torch on the CPU."""

import torch
from torch import Tensor

from mamba_ops import causal_conv1d_update
from mamba_ops.registry import Backend

example = Backend("example", devices=("cpu",), priority=-5)  # below `torch`: it runs only if asked for by name


def _why_not(
    x: Tensor, conv_state: Tensor, cu_seqlens: Tensor | None, num_accepted_tokens: Tensor | None
) -> str | None:
    if cu_seqlens is not None or x.dim() != 2:
        return "takes one token a row, x as (n, dim) without cu_seqlens"
    if num_accepted_tokens is not None:
        return "does not do speculative decoding (num_accepted_tokens)"
    if torch.float64 in (x.dtype, conv_state.dtype):
        return "computes in float32, and x or conv_state is float64"
    return None


@example.implements(causal_conv1d_update, unsupported=_why_not)
def _causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    n, history = x.shape[0], weight.shape[1] - 1
    rows = torch.arange(n)
    slot = rows
    if slots is not None:
        slot = (slots if slots.dim() == 1 else slots[:, 0])[:n].long()
        rows = ((slot >= 0) & (slot != null_slot)).nonzero().squeeze(1)  # those that are somebody's
        slot = slot[rows]

    old, new = conv_state[slot, :, :history], x[rows].unsqueeze(2)
    window = torch.cat([old.float(), new.float()], dim=2)
    result = (window * weight.float()).sum(2)
    if bias is not None:
        result += bias.float()
    if silu:
        result *= torch.sigmoid(result)

    output.zero_()  # only now: it may be x
    output[rows] = result.to(output.dtype)
    conv_state[slot, :, :history] = torch.cat([old[:, :, 1:], new.to(conv_state.dtype)], dim=2)
