"""Adapter of the C++ kernel of selective_state_update."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._cpp import build
from mamba_ops.ops._cpp.call import indices, tensor

if TYPE_CHECKING:
    from mamba_ops.ops.selective_state_update.op import Arguments


def unsupported(call: "Arguments") -> str | None:
    """Takes no float64 x, no rounding_seed and no state_scale."""
    if call.x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    if call.rounding_seed is not None:
        return "rounds states to the nearest, and a rounding_seed is given"
    if call.state_scale is not None:
        return f"takes states of 16-bit floats and wider ones, and ssm_state is {short(call.ssm_state.dtype)}"
    return build.why_not("selective_state_update")


def selective_state_update(call: "Arguments") -> None:
    n = row_count(call.x, call.cu_seqlens)
    if n == 0:
        return
    has_heads = call.ssm_state.dim() == 4
    heads = call.x.shape[-2] if has_heads else 1
    (dim, dstate), packed = call.ssm_state.shape[-2:], call.cu_seqlens is not None
    channels = 2 if has_heads else 1
    flat = call.x.dim() == channels + 1  # one token a row, or packed ones

    by_slot, *by_rest = call.ssm_state.stride()

    def tokens(given: Tensor | None) -> tuple[int, ...]:
        """With strides by row, token, head or group, and channel or number of the state."""
        if given is None:
            return (0, 0, 0, 0, 0, 0)
        by = given.stride()
        if flat:
            by = (0, *by) if packed else (by[0], 0, *by[1:])
        if not has_heads:
            by = (by[0], by[1], 0, by[2])
        return tensor(given, *by) if len(by) == 4 else tensor(given, *by, 0)

    def weight(given: Tensor | None, rank: int) -> tuple[int, ...]:
        """With strides by head, by channel, and of A by number of the state."""
        if given is None:
            return (0,) * (rank + 2)
        by = given.stride() if has_heads else (0, *given.stride())
        return tensor(given, *by, *(0,) * (rank - len(by)))

    build.run_of("selective_state_update")(
        [
            n,
            heads,
            dim,
            dstate,
            call.B.shape[-2] if has_heads else 1,
            call.dt_softplus,
            call.A.dim() < call.ssm_state.dim() - 1,
            torch.get_num_threads(),
            call.null_slot,
            call.ssm_state.shape[0],
            call.x.shape[0] if packed else 1 if flat else call.x.shape[1],
            *indices(call.cu_seqlens),
            *indices(call.slots),
            *indices(call.write_slots),
            *indices(call.num_accepted_tokens),
            *tensor(call.ssm_state, by_slot, *(() if has_heads else (0,)), *by_rest),
            *tokens(call.x),
            *tokens(call.dt),
            *weight(call.A, 3),
            *tokens(call.B),
            *tokens(call.C),
            *weight(call.D, 2),
            *tokens(call.z),
            *weight(call.dt_bias, 2),
            *tokens(call.output),
        ]
    )
