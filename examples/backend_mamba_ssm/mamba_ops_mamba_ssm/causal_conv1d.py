"""The short convolution, over sequences and for decoding, on `causal_conv1d_cuda`; loaded when it first runs."""

import causal_conv1d_cuda
import torch
from torch import Tensor

from mamba_ops.ops import slots as slot_tables


def _weights(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in one dtype that holds both, side by side."""
    if bias is None:
        return weight.contiguous(), None
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    conv_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    rows, _, dim = x.shape
    history = weight.shape[1] - 1
    weight, bias = _weights(weight, bias)
    is_empty = torch.zeros(rows, dtype=torch.bool, device=x.device)
    slot, is_active, target, stored = slot_tables.row_ends(slots, write_slots, null_slot, is_empty, None)
    initial = last = None
    if conv_state is not None:
        last = x.new_empty(rows, history, dim).transpose(1, 2)
        if has_initial_state is not None:
            carried = (is_active & has_initial_state).view(-1, 1, 1)
            kept = conv_state[torch.where(is_active, slot, 0), :, :history].transpose(1, 2)
            initial = torch.where(carried, kept, 0).contiguous().transpose(1, 2)
    causal_conv1d_cuda.causal_conv1d_fwd(
        x.transpose(1, 2), weight, bias, None, initial, output.transpose(1, 2), last, silu
    )
    if slots is not None:
        output.masked_fill_(~is_active.view(-1, 1, 1), 0)
    if conv_state is not None and last is not None:
        slot_tables.store_rows(conv_state[:, :, :history], target, last, stored)


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
    newest_last: bool = False,
    output: Tensor,
) -> None:
    rows = x.shape[0]
    if x.numel() == 0:
        return
    weight, bias = _weights(weight, bias)
    if not newest_last:  # of a longer state it reads and moves the end
        conv_state = conv_state[:, :, : weight.shape[1] - 1]
    if slots is None:
        conv_state, indices = conv_state[:rows], None
    else:
        slots = (slots if slots.dim() == 1 else slots[:, 0])[:rows]
        indices = slots.masked_fill(slots == null_slot, -1).to(torch.int32)  # it skips what is negative
    x, output = (t.unsqueeze(2) if t.dim() == 2 else t.transpose(1, 2) for t in (x, output))
    causal_conv1d_cuda.causal_conv1d_update(x, conv_state, weight, bias, output, silu, None, indices)
