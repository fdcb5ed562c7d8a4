"""Our own Triton kernels: one source for CUDA, ROCm and XPU; interpreted on the CPU if asked for by name."""

import os

import torch
from torch import Tensor

from mamba_ops.ops import causal_conv1d_update, selective_state_update
from mamba_ops.registry import Backend


def _interpreted_on() -> tuple[str, ...]:
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


triton = Backend(
    "triton",
    devices=("cuda", "xpu"),
    devices_by_name=_interpreted_on,
    requires="triton",
    install="mamba-ops[triton]",
    priority=20,
)


def _why_not(x: Tensor) -> str | None:
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


def _why_not_conv(x: Tensor, conv_state: Tensor) -> str | None:
    if conv_state.dtype == torch.float64:
        return "moves what it keeps through float32, and conv_state is float64"
    return _why_not(x)


@triton.implements(causal_conv1d_update, unless=_why_not_conv)
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
    from mamba_ops.kernels.triton.causal_conv1d_update import causal_conv1d_update as kernel

    kernel(x, conv_state, weight, bias, slots, cu_seqlens, num_accepted_tokens, silu, null_slot, output)


@triton.implements(selective_state_update, unless=_why_not)
def _selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,  # refused by the op's checks
    philox_rounds: int = 0,
    output: Tensor,
) -> None:
    from mamba_ops.kernels.triton.selective_state_update import selective_state_update as kernel

    kernel(
        state,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        slots=slots,
        write_slots=write_slots,
        cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens,
        null_slot=null_slot,
        output=output,
    )
