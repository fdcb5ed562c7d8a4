"""The backend `example`: its record, what its one kernel refuses, and where that kernel is."""

import torch
from torch import Tensor

from mamba_ops import causal_conv1d_update
from mamba_ops.registry import Backend

example = Backend("example", devices=("cpu",), priority=-5)  # below `torch`: it runs only if asked for by name


def _unsupported(
    x: Tensor, conv_state: Tensor, cu_seqlens: Tensor | None, num_accepted_tokens: Tensor | None
) -> str | None:
    if cu_seqlens is not None or x.dim() != 2:
        return "takes one token a row, x as (n, dim) without cu_seqlens"
    if num_accepted_tokens is not None:
        return "does not do speculative decoding (num_accepted_tokens)"
    if torch.float64 in (x.dtype, conv_state.dtype):
        return "computes in float32, and x or conv_state is float64"
    return None


example.implements(
    causal_conv1d_update,
    "mamba_ops_example_backend.causal_conv1d_update:causal_conv1d_update",
    unsupported=_unsupported,
)
