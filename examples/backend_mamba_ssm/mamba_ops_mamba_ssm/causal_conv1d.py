"""The backend `causal_conv1d`: the short convolution, over sequences and for decoding, on `causal_conv1d_cuda`."""

import torch
from torch import Tensor

from mamba_ops import causal_conv1d, causal_conv1d_update
from mamba_ops.ops import slots as slot_tables
from mamba_ops.registry import Backend

backend = Backend(
    "causal_conv1d", devices=("cuda",), requires="causal_conv1d_cuda", install="causal-conv1d", priority=15
)


def _why_not(
    x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, output: Tensor
) -> str | None:
    """What both kernels refuse."""
    if cu_seqlens is not None:
        return "takes no packed rows"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype == torch.float64:
            return f"computes in float32, and {name} is float64"
    for name, tensor in (("conv_state", conv_state), ("out", output)):
        if tensor is not None and tensor.dtype != x.dtype:
            mine, other = (str(t.dtype).removeprefix("torch.") for t in (x, tensor))
            return f"takes {name} in x's {mine}, and it is {other}"
    if weight.shape[1] > 4:
        return f"takes a width of at most 4, and weight has {weight.shape[1]}"
    return None


def _too_far(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if tensor.shape[0] * tensor.stride(0) >= 2**32:
            return f"counts numbers with 32 bits, and {name} has more"
    return None


def _weights(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in one dtype that holds both, side by side."""
    if bias is None:
        return weight.contiguous(), None
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


# ---- over sequences --------------------------------------------------------------------------------------------------


def _why_not_sequences(
    x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, output: Tensor
) -> str | None:
    if reason := _why_not(x, conv_state, weight, bias, cu_seqlens, output):
        return reason
    if x.shape[2] % 8:
        return f"takes a dim that 8 divides, and it is {x.shape[2]}"
    if x.shape[1] < max(weight.shape[1], 2):
        return f"takes rows of at least {max(weight.shape[1], 2)} tokens, and they have {x.shape[1]}"
    return None


def _why_not_sequences_now(x: Tensor, output: Tensor) -> str | None:
    for name, tensor in (("x", x), ("out", output)):
        row, token, channel = tensor.stride()
        if channel != 1:
            return f"takes an {name} whose channels are side by side, and its strides are {tensor.stride()}"
        if token % 8 or row % 8 or tensor.data_ptr() % 16:
            return f"takes an {name} whose tokens start at multiples of 8 numbers and 16 bytes, and not all of them do"
    return _too_far(x=x, out=output)


@backend.implements(causal_conv1d, unsupported=_why_not_sequences, unsupported_layout=_why_not_sequences_now)
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    conv_state: Tensor | None = None,
    slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    import causal_conv1d_cuda

    rows, _, dim = x.shape
    history = weight.shape[1] - 1
    weight, bias = _weights(weight, bias)
    slot, somebody = (table[:, 0] for table in slot_tables.row_slots(slots, rows, null_slot, x.device))
    initial = last = None
    if conv_state is not None:
        last = x.new_empty(rows, history, dim).transpose(1, 2)
        if has_initial_state is not None:
            carried = (somebody & has_initial_state).view(-1, 1, 1)
            kept = conv_state[torch.where(somebody, slot, 0), :, :history].transpose(1, 2)
            initial = torch.where(carried, kept, 0).contiguous().transpose(1, 2)
    causal_conv1d_cuda.causal_conv1d_fwd(
        x.transpose(1, 2), weight, bias, None, initial, output.transpose(1, 2), last, silu
    )
    if slots is not None:
        output.masked_fill_(~somebody.view(-1, 1, 1), 0)
    if conv_state is not None and last is not None:
        slot_tables.store_rows(conv_state[:, :, :history], slot, last, somebody)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _why_not_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    output: Tensor,
) -> str | None:
    if num_accepted_tokens is not None:
        return "does no speculative decoding"
    return _why_not(x, conv_state, weight, bias, cu_seqlens, output)


def _why_not_update_now(x: Tensor, conv_state: Tensor, output: Tensor) -> str | None:
    return _too_far(x=x, conv_state=conv_state, out=output)


@backend.implements(causal_conv1d_update, unsupported=_why_not_update, unsupported_layout=_why_not_update_now)
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
    import causal_conv1d_cuda

    rows = x.shape[0]
    if x.numel() == 0:
        return
    weight, bias = _weights(weight, bias)
    conv_state = conv_state[:, :, : weight.shape[1] - 1]  # of a longer state it would read and move the end
    if slots is None:
        conv_state, indices = conv_state[:rows], None
    else:
        slots = (slots if slots.dim() == 1 else slots[:, 0])[:rows]
        indices = slots.masked_fill(slots == null_slot, -1).to(torch.int32)  # it skips what is negative
    x, output = (t.unsqueeze(2) if t.dim() == 2 else t.transpose(1, 2) for t in (x, output))
    causal_conv1d_cuda.causal_conv1d_update(x, conv_state, weight, bias, output, silu, None, indices)
