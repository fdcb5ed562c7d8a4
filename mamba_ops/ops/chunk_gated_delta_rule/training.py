"""The gradients of chunk_gated_delta_rule: its companions for training."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.samples import training_samples
from mamba_ops.ops._common.training import check_initial_states, dtype_of_states, new_output, states_to_run_on
from mamba_ops.ops.chunk_gated_delta_rule.op import chunk_gated_delta_rule
from mamba_ops.registry import Sample


class BackwardArguments(NamedTuple):
    """A call of chunk_gated_delta_rule_backward: what its checks and its kernels get."""

    grad_output: Tensor
    grad_final_states: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_states: Tensor | None
    cu_seqlens: Tensor | None
    scale: float | None
    qk_l2norm: bool
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_g: Tensor
    grad_beta: Tensor
    grad_initial_states: Tensor


def _output(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return new_output(v, cu_seqlens)


def _final_states(q: Tensor, v: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """In float32 at least, unless there are initial states; a row without tokens keeps its zeros."""
    dtype = dtype_of_states(v, initial_states)
    return v.new_zeros((row_count(v, cu_seqlens), *v.shape[-2:], q.shape[-1]), dtype=dtype)


def _validate(q: Tensor, v: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
    shape = row_count(v, cu_seqlens), *v.shape[-2:], q.shape[-1]
    check_initial_states(initial_states, v, shape, "(rows, v_heads, v_dim, k_dim)")


@chunk_gated_delta_rule.training(
    differentiable=("q", "k", "v", "g", "beta", "initial_states"),
    results={"output": _output, "final_states": _final_states},
    batched=("q", "k", "v", "g", "beta", "initial_states"),
    validate=_validate,
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    *,
    output: Tensor,
    final_states: Tensor | None,
) -> None:
    state, known = states_to_run_on(initial_states, final_states)
    chunk_gated_delta_rule.call_undispatched(
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        cu_seqlens=cu_seqlens,
        ssm_state=state,
        has_initial_state=known,
        qk_l2norm=qk_l2norm,
        out=output,
    )


chunk_gated_delta_rule.backward(
    "mamba_ops.ops.chunk_gated_delta_rule.reference_backward:chunk_gated_delta_rule_backward", BackwardArguments
)


@chunk_gated_delta_rule.sharding
def _sharding(v: Any, q: Any, cu_seqlens: Any) -> list[dict[str, int]]:
    """By heads, with one head of q and k whole everywhere or several split as those of v are; and by rows."""
    of_heads = v.ndim - 2
    keys = {} if q.shape[-2] == 1 else {"q": of_heads, "k": of_heads}
    values = {
        "v": of_heads,
        "g": of_heads,
        "beta": of_heads,
        "initial_states": 1,
        "output": of_heads,
        "final_states": 1,
    }
    rows = dict.fromkeys(("q", "k", "v", "g", "beta", "initial_states", "output", "final_states"), 0)
    return [keys | values, *([rows] if cu_seqlens is None else [])]


@chunk_gated_delta_rule.flops
def _flops(q: torch.Size, v: torch.Size) -> tuple[int, int]:
    """Of the matrix products of chunks of 64 tokens, in which half of all pairs of tokens count."""
    tokens, (k_heads, k_dim), (v_heads, v_dim) = math.prod(v[:-2]), q[-2:], v[-2:]
    pairs, read = tokens * 64 // 2, tokens * v_heads * v_dim * k_dim
    forward = 2 * (pairs * 2 * (k_heads * k_dim + v_heads * v_dim) + 3 * read)
    return forward, 2 * (pairs * (2 * k_heads * k_dim + v_heads * (4 * v_dim + 3 * k_dim)) + 8 * read)


@chunk_gated_delta_rule.training_samples
def _samples(device: torch.device, **sizes: Any) -> Iterator[Sample]:
    return training_samples(chunk_gated_delta_rule, "ssm_state", device, **sizes)


def _unsupported(grad_output: Tensor, q: Tensor, v: Tensor) -> str | None:
    """Takes no float64 q, v or grad_output, and a k_dim and a v_dim of at most 256."""
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes a k_dim and a v_dim of at most 256, and they are {q.shape[-1]} and {v.shape[-1]}"
    return "computes in float32, and q is float64" if torch.float64 in (q.dtype, v.dtype, grad_output.dtype) else None


triton.implements(
    chunk_gated_delta_rule.backward_op,
    "mamba_ops.ops.chunk_gated_delta_rule.triton:chunk_gated_delta_rule_backward",
    unsupported=_unsupported,
)
