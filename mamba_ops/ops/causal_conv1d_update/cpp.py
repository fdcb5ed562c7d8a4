"""Adapter of the C++ kernel of causal_conv1d_update."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._cpp import build
from mamba_ops.ops._cpp.call import indices, tensor, whole

if TYPE_CHECKING:
    from mamba_ops.ops.causal_conv1d_update.op import Arguments


def unsupported(call: "Arguments") -> str | None:
    """Takes no float64 x or conv_state."""
    if call.conv_state.dtype == torch.float64:
        return "moves what it keeps through float32, and conv_state is float64"
    if call.x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    return build.why_not("causal_conv1d_update")


def causal_conv1d_update(call: "Arguments") -> None:
    n, (dim, width), packed = row_count(call.x, call.cu_seqlens), call.weight.shape, call.cu_seqlens is not None
    flat = call.x.dim() == 2

    def tokens(given: Tensor) -> tuple[int, ...]:
        """With strides by row, token and channel."""
        strides = given.stride()
        return tensor(given, *(((0, strides[0]) if packed else (strides[0], 0)) if flat else strides[:2]), strides[-1])

    build.run_of("causal_conv1d_update")(
        [
            n,
            dim,
            width,
            call.conv_state.shape[2],
            call.newest_last,
            call.silu,
            torch.get_num_threads(),
            call.null_slot,
            call.conv_state.shape[0],
            call.x.shape[0] if packed else 1 if flat else call.x.shape[1],
            *indices(call.cu_seqlens),
            *indices(call.slots),
            *indices(call.num_accepted_tokens),
            *tokens(call.x),
            *whole(call.conv_state, 3),
            *whole(call.weight, 2),
            *whole(call.bias, 1),
            *tokens(call.output),
        ]
    )
