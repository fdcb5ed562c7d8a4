"""The gradients of mamba_chunk_scan: its companions for training."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.samples import training_samples
from mamba_ops.ops._common.training import check_initial_states, dtype_of_states, new_output, states_to_run_on
from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan
from mamba_ops.registry import Sample


class BackwardArguments(NamedTuple):
    """A call of mamba_chunk_scan_backward: what its checks and its kernels get."""

    grad_output: Tensor
    grad_final_states: Tensor | None
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    chunk_size: int
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None
    cu_seqlens: Tensor | None
    dt_softplus: bool
    dt_min: float
    dt_max: float
    grad_x: Tensor
    grad_dt: Tensor
    grad_A: Tensor
    grad_B: Tensor
    grad_C: Tensor
    grad_D: Tensor
    grad_z: Tensor
    grad_dt_bias: Tensor
    grad_initial_states: Tensor


def _final_states(x: Tensor, B: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """In float32 at least, unless there are initial states; a row without tokens keeps its zeros."""
    dtype = dtype_of_states(x, initial_states)
    return x.new_zeros((row_count(x, cu_seqlens), *x.shape[-2:], B.shape[-1]), dtype=dtype)


def _validate(x: Tensor, B: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
    shape = row_count(x, cu_seqlens), *x.shape[-2:], B.shape[-1]
    check_initial_states(initial_states, x, shape, "(rows, heads, dim, dstate)")


@mamba_chunk_scan.training(
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
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    *,
    output: Tensor,
    final_states: Tensor | None,
) -> None:
    state, known = states_to_run_on(initial_states, final_states)
    mamba_chunk_scan.call_undispatched(
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
        ssm_state=state,
        has_initial_state=known,
        out=output,
    )


mamba_chunk_scan.backward(
    "mamba_ops.ops.mamba_chunk_scan.reference_backward:mamba_chunk_scan_backward", BackwardArguments
)


@mamba_chunk_scan.sharding
def _sharding(x: Any, B: Any, cu_seqlens: Any) -> list[dict[str, int]]:
    """By heads, with one group whole everywhere or several split as heads are; and by rows."""
    last = x.ndim - 1
    groups = {} if B.shape[-2] == 1 else {"B": last - 1, "C": last - 1}
    states = {"initial_states": 1, "final_states": 1}
    heads = {"x": last - 1, "dt": last - 1, "A": 0, "D": 0, "z": last - 1, "dt_bias": 0, "output": last - 1}
    rows = dict.fromkeys(("x", "dt", "B", "C", "z", "initial_states", "output", "final_states"), 0)
    return [heads | groups | states, *([rows] if cu_seqlens is None else [])]


@mamba_chunk_scan.flops
def _flops(x: torch.Size, B: torch.Size, chunk_size: int) -> tuple[int, int]:
    """Of the matrix products of chunks of this size, in which half of all pairs of tokens count."""
    tokens, (heads, dim), (groups, dstate) = math.prod(x[:-2]), x[-2:], B[-2:]
    pairs, read = tokens * chunk_size // 2, tokens * heads * dim * dstate
    forward = 2 * (pairs * (groups * dstate + heads * dim) + 2 * read)
    return forward, 2 * (pairs * (3 * groups * dstate + 2 * heads * dim) + 5 * read)


@mamba_chunk_scan.training_samples
def _samples(device: torch.device, **sizes: Any) -> Iterator[Sample]:
    return training_samples(mamba_chunk_scan, "ssm_state", device, **sizes)


def _unsupported(grad_output: Tensor, x: Tensor, B: Tensor) -> str | None:
    """Takes no float64 x or grad_output, a dim of at most 128 and a dstate of at most 256."""
    if x.shape[-1] > 128 or B.shape[-1] > 256:
        return f"takes a dim of at most 128 and a dstate of at most 256, not {x.shape[-1]} and {B.shape[-1]}"
    return "computes in float32, and x is float64" if torch.float64 in (x.dtype, grad_output.dtype) else None


triton.implements(
    mamba_chunk_scan.backward_op,
    "mamba_ops.ops.mamba_chunk_scan.triton:mamba_chunk_scan_backward",
    unsupported=_unsupported,
)
