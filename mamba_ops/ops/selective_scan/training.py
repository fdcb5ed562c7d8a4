"""The gradients of selective_scan: its companions for training."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.samples import training_samples
from mamba_ops.ops._common.training import check_initial_states, dtype_of_states, new_output, states_to_run_on
from mamba_ops.ops.selective_scan.op import selective_scan
from mamba_ops.registry import Sample


class BackwardArguments(NamedTuple):
    """A call of selective_scan_backward: what its checks and its kernels get."""

    grad_output: Tensor
    grad_final_states: Tensor | None
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    grad_x: Tensor
    grad_dt: Tensor
    grad_A: Tensor
    grad_B: Tensor
    grad_C: Tensor
    grad_D: Tensor
    grad_z: Tensor
    grad_dt_bias: Tensor
    grad_initial_states: Tensor


def _final_states(x: Tensor, A: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """In float32 at least, unless there are initial states; a row without tokens keeps its zeros."""
    dtype = dtype_of_states(x, initial_states)
    return x.new_zeros((row_count(x, cu_seqlens), *A.shape), dtype=dtype)


def _validate(x: Tensor, A: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
    shape = row_count(x, cu_seqlens), *A.shape
    check_initial_states(initial_states, x, shape, "(rows, dim, dstate)")


@selective_scan.training(
    differentiable=("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"),
    results={"output": new_output, "final_states": _final_states},
    batched=("x", "dt", "B", "C", "z", "initial_states"),
    validate=_validate,
)
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    output: Tensor,
    final_states: Tensor | None,
) -> None:
    state, known = states_to_run_on(initial_states, final_states)
    selective_scan.call_undispatched(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        cu_seqlens=cu_seqlens,
        ssm_state=state,
        has_initial_state=known,
        out=output,
    )


selective_scan.backward("mamba_ops.ops.selective_scan.reference_backward:selective_scan_backward", BackwardArguments)


@selective_scan.sharding
def _sharding(x: Any, B: Any, cu_seqlens: Any) -> list[dict[str, int]]:
    """By channels, with one group whole everywhere or several split as channels are; and by rows."""
    last = x.ndim - 1
    groups = {} if B.ndim == x.ndim or B.shape[-2] == 1 else {"B": last, "C": last}
    states = {"initial_states": 1, "final_states": 1}
    channels = {"x": last, "dt": last, "A": 0, "D": 0, "z": last, "dt_bias": 0, "output": last}
    rows = dict.fromkeys(("x", "dt", "B", "C", "z", "initial_states", "output", "final_states"), 0)
    return [channels | groups | states, *([rows] if cu_seqlens is None else [])]


@selective_scan.flops
def _flops(x: torch.Size, A: torch.Size) -> tuple[int, int]:
    """Of the recurrence: decay, add and read every number of the state; twice that and the rates' gradients back."""
    entries = math.prod(x) * A[1]
    return 6 * entries, 18 * entries


@selective_scan.training_samples
def _samples(device: torch.device, **sizes: Any) -> Iterator[Sample]:
    return training_samples(selective_scan, "ssm_state", device, **sizes)


def _unsupported(grad_output: Tensor, x: Tensor, A: Tensor) -> str | None:
    """Takes no float64 x or grad_output, and a dstate of at most 256."""
    if A.shape[1] > 256:
        return f"takes a dstate of at most 256, and A has {A.shape[1]}"
    return "computes in float32, and x is float64" if torch.float64 in (x.dtype, grad_output.dtype) else None


triton.implements(
    selective_scan.backward_op,
    "mamba_ops.ops.selective_scan.triton:selective_scan_backward",
    unsupported=_unsupported,
)
