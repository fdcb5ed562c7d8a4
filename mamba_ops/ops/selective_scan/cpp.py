"""Adapter of the C++ kernel of selective_scan."""

from typing import TYPE_CHECKING

import torch

from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._cpp import build
from mamba_ops.ops._cpp.call import indices, tensor, whole

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.op import Arguments


def unsupported(call: "Arguments") -> str | None:
    """Takes no float64 x, and no prefix cache (block_size)."""
    if call.x.dtype == torch.float64:
        return "computes in float32, and x is float64"
    if call.block_size:
        return f"keeps no states of a prefix cache, and block_size is {call.block_size}"
    return build.why_not("selective_scan")


def selective_scan(call: "Arguments") -> None:
    dim, dstate = call.A.shape
    n = row_count(call.x, call.cu_seqlens)
    if n == 0:
        return
    packed = call.cu_seqlens is not None
    groups = call.B.shape[-2] if call.B.dim() > call.x.dim() else 1

    def tokens(given: torch.Tensor | None) -> tuple[int, ...]:
        if given is None:
            return tensor(None, 0, 0, 0)
        return tensor(given, *((0,) if packed else ()), *given.stride())

    def columns(given: torch.Tensor) -> tuple[int, ...]:
        *lead, last = given.stride()
        of_group = () if given.dim() > call.x.dim() else (0,)
        return tensor(given, *((0,) if packed else ()), *lead, *of_group, last)

    call_numbers = [
        n,
        dim,
        dstate,
        groups,
        call.dt_softplus,
        torch.get_num_threads(),
        call.null_slot,
        2**62 if call.ssm_state is None else call.ssm_state.shape[0],
        call.x.shape[0 if packed else 1],
        *indices(call.cu_seqlens),
        *indices(call.slots),
        *indices(call.write_slots),
        *indices(call.has_initial_state),
        *tokens(call.x),
        *tokens(call.dt),
        *whole(call.A, 2),
        *columns(call.B),
        *columns(call.C),
        *whole(call.D, 1),
        *tokens(call.z),
        *whole(call.dt_bias, 1),
        *whole(call.ssm_state, 3),
        *tokens(call.output),
    ]
    build.run_of("selective_scan")(call_numbers)
