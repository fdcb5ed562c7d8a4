"""Our own Triton kernels: one source for CUDA, ROCm and XPU; interpreted on the CPU if asked for by name."""

import functools
import math
import os

import torch
from torch import Tensor

from mamba_ops.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    gated_delta_rule_update,
    mamba_chunk_scan,
    selective_scan,
    selective_state_update,
)
from mamba_ops.registry import Backend
from mamba_ops.registry.compiling import announce


def _interpreted_on() -> tuple[str, ...]:
    return ("cpu",) if os.environ.get("TRITON_INTERPRET") == "1" else ()


def _watch_compiler() -> None:
    """Let Triton say when it is about to compile a kernel, to whoever forbids that."""
    from mamba_ops.kernels.triton.watch import watch

    watch(announce)


triton = Backend(
    "triton",
    devices=("cuda", "xpu"),
    devices_by_name=_interpreted_on,
    requires="triton",
    install="mamba-ops[triton]",
    priority=20,
    prepare=_watch_compiler,
)


def _why_not(x: Tensor) -> str | None:
    return "computes in float32, and x is float64" if x.dtype == torch.float64 else None


def _why_not_conv(x: Tensor, conv_state: Tensor | None) -> str | None:
    if conv_state is not None and conv_state.dtype == torch.float64:
        return "moves what it keeps through float32, and conv_state is float64"
    return _why_not(x)


@triton.implements(causal_conv1d, unless=_why_not_conv)
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
    """Takes no float64 x or conv_state."""
    from mamba_ops.kernels.triton.causal_conv1d import causal_conv1d as kernel

    kernel(x, weight, bias, cu_seqlens, conv_state, slots, has_initial_state, silu, null_slot, output)


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
    """Takes no float64 x or conv_state."""
    from mamba_ops.kernels.triton.causal_conv1d_update import causal_conv1d_update as kernel

    kernel(x, conv_state, weight, bias, slots, cu_seqlens, num_accepted_tokens, silu, null_slot, output)


@functools.cache
def _rounds_by_hardware(device: torch.device) -> bool:
    """Whether the GPU has the instruction that rounds stochastically, cvt.rs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.get_device_module(device).get_device_capability(device) in ((10, 0), (10, 3))


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
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    output: Tensor,
) -> None:
    """Takes no float64 x."""
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
        rounding_seed=rounding_seed,
        philox_rounds=philox_rounds or 10,
        round_by_hardware=rounding_seed is not None and _rounds_by_hardware(x.device),
        output=output,
    )


def _why_not_scan(x: Tensor, B: Tensor, chunk_size: int) -> str | None:
    if B.shape[-1] > 256:
        return f"takes a dstate of at most 256, and B has {B.shape[-1]}"
    if chunk_size > 4096:
        return f"takes chunks of at most 4096 tokens, and chunk_size is {chunk_size}"
    return _why_not(x)


@triton.implements(mamba_chunk_scan, unless=_why_not_scan)
def _mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    cu_seqlens: Tensor | None = None,
    computed_tokens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    chunk_states: Tensor | None = None,
    output: Tensor,
) -> None:
    """Takes no float64 x, a dstate of at most 256, and chunks of at most 4096 tokens."""
    from mamba_ops.kernels.triton.mamba_chunk_scan import mamba_chunk_scan as kernel

    kernel(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_min=dt_min,
        dt_max=dt_max,
        cu_seqlens=cu_seqlens,
        computed_tokens=computed_tokens,
        ssm_state=ssm_state,
        slots=slots,
        write_slots=write_slots,
        has_initial_state=has_initial_state,
        null_slot=null_slot,
        chunk_states=chunk_states,
        output=output,
    )


def _why_not_selective_scan(u: Tensor, A: Tensor) -> str | None:
    if A.shape[1] > 256:
        return f"takes a dstate of at most 256, and A has {A.shape[1]}"
    return "computes in float32, and u is float64" if u.dtype == torch.float64 else None


@triton.implements(selective_scan, unless=_why_not_selective_scan)
def _selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    block_size: int = 0,
    first_block: Tensor | None = None,
    last_block: Tensor | None = None,
    initial_block: Tensor | None = None,
    chunk_ends: Tensor | None = None,
    last_chunk: Tensor | None = None,
    output: Tensor,
) -> None:
    """Takes no float64 u, and a dstate of at most 256."""
    from mamba_ops.kernels.triton.selective_scan import selective_scan as kernel

    kernel(
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        cu_seqlens=cu_seqlens,
        ssm_state=ssm_state,
        slots=slots,
        write_slots=write_slots,
        has_initial_state=has_initial_state,
        null_slot=null_slot,
        block_size=block_size,
        first_block=first_block,
        last_block=last_block,
        initial_block=initial_block,
        chunk_ends=chunk_ends,
        last_chunk=last_chunk,
        output=output,
    )


def _why_not_delta_rule(q: Tensor, v: Tensor) -> str | None:
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes a k_dim and a v_dim of at most 256, and they are {q.shape[-1]} and {v.shape[-1]}"
    return "computes in float32, and q is float64" if q.dtype == torch.float64 else None


@triton.implements(chunk_gated_delta_rule, unless=_why_not_delta_rule)
def _chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    """Takes no float64 q, and a k_dim and a v_dim of at most 256."""
    from mamba_ops.kernels.triton.chunk_gated_delta_rule import chunk_gated_delta_rule as kernel

    kernel(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        cu_seqlens=cu_seqlens,
        state=state,
        slots=slots,
        write_slots=write_slots,
        has_initial_state=has_initial_state,
        qk_l2norm=qk_l2norm,
        null_slot=null_slot,
        output=output,
    )


@triton.implements(gated_delta_rule_update, unless=_why_not_delta_rule)
def _gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    """Takes no float64 q, and a k_dim and a v_dim of at most 256."""
    from mamba_ops.kernels.triton.gated_delta_rule_update import gated_delta_rule_update as kernel

    kernel(
        state,
        q,
        k,
        v,
        g=g,
        beta=beta,
        a=a,
        b=b,
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        slots=slots,
        write_slots=write_slots,
        cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens,
        qk_l2norm=qk_l2norm,
        null_slot=null_slot,
        output=output,
    )
