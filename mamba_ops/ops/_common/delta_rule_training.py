"""How the gated delta rules record gradients, whatever decays what."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.backends import triton
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.delta_rule import BackwardArguments
from mamba_ops.ops._common.samples import training_samples
from mamba_ops.ops._common.training import check_initial_states, dtype_of_states, new_output, states_to_run_on
from mamba_ops.registry import Op, Sample

Refusal = Callable[[Tensor, Tensor], str | None]


def record_gradients(op: "Op[...]", backward: str, by_triton: str, unsupported: Refusal) -> None:
    """Give an op that reads whole sequences its companions for training.

    Args:
        op: the op.
        backward: the path of the reference of its backward pass.
        by_triton: that of its Triton kernel.
        unsupported: why that takes no q and v like these, or None.
    """

    @op.training(
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
        options = {"scale": scale, "cu_seqlens": cu_seqlens, "qk_l2norm": qk_l2norm, "out": output}
        op.call_undispatched(q, k, v, g, beta, ssm_state=state, has_initial_state=known, **options)

    op.backward(backward, BackwardArguments)
    op.sharding(_sharding)

    @op.training_samples
    def _samples(device: torch.device, **sizes: Any) -> Iterator[Sample]:
        return training_samples(op, "ssm_state", device, **sizes)

    def _unsupported(grad_output: Tensor, q: Tensor, v: Tensor) -> str | None:
        """Takes no float64 v or grad_output, either."""
        reason = unsupported(q, v)
        if reason is None and torch.float64 in (v.dtype, grad_output.dtype):
            return "computes in float32, and v or grad_output is float64"
        return reason

    triton.implements(op.backward_op, by_triton, unsupported=_unsupported)


def _output(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return new_output(v, cu_seqlens)


def _final_states(q: Tensor, v: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """In float32 at least, unless there are initial states; a row without tokens keeps its zeros."""
    dtype = dtype_of_states(v, initial_states)
    return v.new_zeros((row_count(v, cu_seqlens), *v.shape[-2:], q.shape[-1]), dtype=dtype)


def _validate(q: Tensor, v: Tensor, initial_states: Tensor | None, cu_seqlens: Tensor | None) -> None:
    shape = row_count(v, cu_seqlens), *v.shape[-2:], q.shape[-1]
    check_initial_states(initial_states, v, shape, "(rows, v_heads, v_dim, k_dim)")


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
