"""The functions of flash-linear-attention 0.6 for the gated delta rule, over our ops.

States of fla are `(n, v_heads, k_dim, v_dim)` unless `state_v_first`; the ops have v_dim first, and get a transposed
view.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops import ops
from mamba_ops.compat.arguments import all_have, refuse
from mamba_ops.registry import answering

OutputAndState = tuple[Tensor, Tensor | None]


@answering
def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    **others: object,
) -> OutputAndState:
    """Read sequences with the gated delta rule; return their output and, if asked for, their last states in float32.

    Args:
        q, k: `(batch, length, k_heads, k_dim)`; with `cu_seqlens` batch is 1.
        v: `(batch, length, v_heads, v_dim)`.
        g: `(batch, length, v_heads)`: the log of the decay, or its gate (`use_gate_in_kernel`).
        beta: `(batch, length, v_heads)`: how much of a value is written, or its logit (`use_beta_sigmoid_in_kernel`).
        scale: of q; None: k_dim ** -0.5.
        initial_state: `(n, v_heads, k_dim, v_dim)`. Not changed.
        output_final_state: whether to return the last states.
        use_qk_l2norm_in_kernel: whether q and k are normalised.
        use_beta_sigmoid_in_kernel: whether sigmoid is applied to beta; with `allow_neg_eigval`, twice the sigmoid.
        state_v_first: whether states are `(n, v_heads, v_dim, k_dim)`.
        cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        cu_seqlens_cpu, chunk_indices: of no effect: they follow from `cu_seqlens`.
        cp_context, others: refused.
        use_gate_in_kernel: whether g is -exp(A_log) * softplus(g + dt_bias), with `A_log` and `dt_bias` `(v_heads,)`.
    """
    refuse("chunk_gated_delta_rule", cp_context=cp_context, **others)
    g = _decay("chunk_gated_delta_rule", g, use_gate_in_kernel, A_log, dt_bias)
    beta = _beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)

    def op(state: Tensor | None, **options: Any) -> Tensor:
        known = None if state is None else all_have(initial_state)
        return ops.chunk_gated_delta_rule(ssm_state=state, has_initial_state=known, scale=scale, **options)

    return _on_states(
        "chunk_gated_delta_rule",
        op,
        (q, k, v, g, beta),
        initial_state,
        output_final_state,
        keep=output_final_state,
        v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )


@answering
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **others: object,
) -> OutputAndState:
    """Read a few tokens of every sequence, one after the other.

    Args:
        g, beta: None: nothing decays, values are written whole.
        gk, gv: refused.

    The other arguments are those of `chunk_gated_delta_rule`.
    """
    name = "fused_recurrent_gated_delta_rule"
    refuse(name, gk=gk, gv=gv, **others)
    zeros = v.new_zeros(v.shape[:-1])
    g = zeros if g is None else _decay(name, g, use_gate_in_kernel, A_log, dt_bias)
    beta = zeros + 1 if beta is None else _beta(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)

    def op(state: Tensor | None, *, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert state is not None  # for mypy; keep=True
        return ops.gated_delta_rule_update(state, q, k, v, scale=scale, **options)

    return _on_states(
        name,
        op,
        (q, k, v, g, beta),
        initial_state,
        output_final_state,
        keep=True,
        v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )


def _on_states(
    function: str,
    op: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
    *,
    keep: bool,
    v_first: bool,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
) -> OutputAndState:
    """Call an op with copies of the initial states; return its output, and the last states or None."""
    q, _, v, *_ = tensors
    if cu_seqlens is not None and q.shape[0] != 1:
        expected = "1: with cu_seqlens all sequences are packed into one row"
        raise ValueError(f"{function}: q: got a batch of {q.shape[0]}, expected {expected}")
    n, dtype = (q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1), _upcast(q)
    state, k_dim, v_dim = None, q.shape[-1], v.shape[-1]
    if initial_state is not None:
        state = initial_state.to(dtype, copy=True)
    elif keep:
        state = q.new_zeros(n, v.shape[-2], *((v_dim, k_dim) if v_first else (k_dim, v_dim)), dtype=dtype)
    if cu_seqlens is not None:
        tensors = tuple(t.squeeze(0) for t in tensors)
    options = dict(zip(("q", "k", "v", "g", "beta"), tensors, strict=True))
    ssm_state = state if state is None or v_first else state.transpose(-1, -2)
    out = op(ssm_state, **options, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm)
    return out if cu_seqlens is None else out.unsqueeze(0), state if output_final_state else None


def _decay(function: str, g: Tensor, raw: bool, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if not raw:
        refuse(function, A_log=A_log, dt_bias=dt_bias)
        return g
    if A_log is None:
        raise ValueError(f"{function}: A_log: got None with use_gate_in_kernel, expected a tensor (v_heads,)")
    g = g.to(_upcast(g))
    return -A_log.to(g.dtype).exp() * functional.softplus(g if dt_bias is None else g + dt_bias)


def _beta(beta: Tensor, raw: bool, twice: bool) -> Tensor:
    return beta.to(_upcast(beta)).sigmoid() * (2 if twice else 1) if raw else beta


def _upcast(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
