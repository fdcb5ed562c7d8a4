"""The usual decode step of the convolution, in plain torch on the CPU; loaded when it first runs."""

import torch
from torch import Tensor


def causal_conv1d_update(
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
        rows = ((slot >= 0) & (slot != null_slot)).nonzero().squeeze(1)  # without padding
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
