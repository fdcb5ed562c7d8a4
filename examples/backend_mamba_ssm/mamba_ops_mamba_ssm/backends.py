"""The backends `mamba_ssm` and `causal_conv1d`: their records, what their kernels refuse, and where those are."""

import torch
from torch import Tensor

from mamba_ops import causal_conv1d, causal_conv1d_update, selective_scan
from mamba_ops.registry import Backend

mamba_ssm = Backend("mamba_ssm", devices=("cuda",), requires="selective_scan_cuda", install="mamba-ssm", priority=15)
convolution = Backend(
    "causal_conv1d", devices=("cuda",), requires="causal_conv1d_cuda", install="causal-conv1d", priority=15
)


# -- selective_scan ---------------------------------------------------------------------------------------------------


def _unsupported_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    has_initial_state: Tensor | None,
    block_size: int,
    output: Tensor,
) -> str | None:
    if cu_seqlens is not None:
        return "takes no packed rows"
    if has_initial_state is not None:
        return "starts every row from zero, and has_initial_state is given"
    if block_size > 0:
        return "keeps no states of a prefix cache"
    if x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    for name, tensor in (("dt", dt), ("B", B), ("C", C), ("z", z), ("out", output)):
        if tensor is not None and tensor.dtype != x.dtype:
            mine, other = (str(t.dtype).removeprefix("torch.") for t in (x, tensor))
            return f"takes {name} in x's {mine}, and it is {other}"
    if A.shape[1] > 256:
        return f"takes a dstate of at most 256, and A has {A.shape[1]}"
    return "takes at least one token, and there is none" if x.numel() == 0 else None


mamba_ssm.implements(selective_scan, "mamba_ops_mamba_ssm.selective_scan:selective_scan", unsupported=_unsupported_scan)


# -- causal_conv1d ----------------------------------------------------------------------------------------------------


def _unsupported_convolution(
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


def _unsupported_sequences(
    x: Tensor, conv_state: Tensor | None, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, output: Tensor
) -> str | None:
    if reason := _unsupported_convolution(x, conv_state, weight, bias, cu_seqlens, output):
        return reason
    if x.shape[2] % 8:
        return f"takes a dim that 8 divides, and it is {x.shape[2]}"
    if x.shape[1] < max(weight.shape[1], 2):
        return f"takes rows of at least {max(weight.shape[1], 2)} tokens, and they have {x.shape[1]}"
    return None


def _unsupported_layout_of_sequences(x: Tensor, output: Tensor) -> str | None:
    for name, tensor in (("x", x), ("out", output)):
        row, token, channel = tensor.stride()
        if channel != 1:
            return f"takes an {name} whose channels are side by side, and its strides are {tensor.stride()}"
        if token % 8 or row % 8 or tensor.data_ptr() % 16:
            return f"takes an {name} whose tokens start at multiples of 8 numbers and 16 bytes, and not all of them do"
    return _too_far(x=x, out=output)


convolution.implements(
    causal_conv1d,
    "mamba_ops_mamba_ssm.causal_conv1d:causal_conv1d",
    unsupported=_unsupported_sequences,
    unsupported_layout=_unsupported_layout_of_sequences,
)


# -- causal_conv1d_update ---------------------------------------------------------------------------------------------


def _unsupported_update(
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
    return _unsupported_convolution(x, conv_state, weight, bias, cu_seqlens, output)


def _unsupported_layout_of_update(x: Tensor, conv_state: Tensor, output: Tensor) -> str | None:
    return _too_far(x=x, conv_state=conv_state, out=output)


convolution.implements(
    causal_conv1d_update,
    "mamba_ops_mamba_ssm.causal_conv1d:causal_conv1d_update",
    unsupported=_unsupported_update,
    unsupported_layout=_unsupported_layout_of_update,
)
