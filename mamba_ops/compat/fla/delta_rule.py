"""The functions of flash-linear-attention 0.6 for the gated delta rule, over our ops.

States of fla are `(n, v_heads, k_dim, v_dim)` unless `state_v_first`; the ops have v_dim first, and get a transposed
view.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mamba_ops import ops
from mamba_ops.compat.arguments import check_states, floating, refuse, upcast, with_states, without_gradients
from mamba_ops.compat.fla.channels import by_channel
from mamba_ops.registry import Op, answering, use_backend

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
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
    **others: object,
) -> OutputAndState:
    """Read sequences with the gated delta rule; return their output and, if asked for, their last states in float32.

    Differentiable: q, k, v, g, beta, A_log, dt_bias and initial_state; last states have gradients too.

    Args:
        q, k: `(batch, length, k_heads, k_dim)`; with `cu_seqlens` batch is 1.
        v: `(batch, length, v_heads, v_dim)`.
        g: `(batch, length, v_heads)`: the log of the decay, or its gate (`use_gate_in_kernel`).
        beta: `(batch, length, v_heads)`: how much of a value is written, or its logit (`use_beta_sigmoid_in_kernel`).
        scale: of q; None: k_dim ** -0.5.
        initial_state: `(n, v_heads, k_dim, v_dim)`. Not changed.
        output_final_state: whether to return the last states.
        use_qk_l2norm_in_kernel: whether q and k are normalised.
        use_beta_sigmoid_in_kernel: whether sigmoid is applied to beta.
        allow_neg_eigval: whether that is twice the sigmoid.
        state_v_first: whether states are `(n, v_heads, v_dim, k_dim)`.
        cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        cu_seqlens_cpu, chunk_indices: of no effect: they follow from `cu_seqlens`.
        cp_context, others: refused.
        use_gate_in_kernel: whether g is -exp(A_log) * softplus(g + dt_bias), with `A_log` and `dt_bias` `(v_heads,)`,
            which are of no effect otherwise.
        chunk_size: 16, 32 or 64, and of no effect on what is computed.
        transpose_state_layout: the older name of `state_v_first`, deprecated.
    """
    name = "chunk_gated_delta_rule"
    refuse(name, cp_context=cp_context, **others)
    if chunk_size not in (16, 32, 64):
        raise ValueError(f"{name}: chunk_size: got {chunk_size}, expected 16, 32 or 64")
    state_v_first = layout_of(name, state_v_first, transpose_state_layout)
    g = _decay(name, g, use_gate_in_kernel, A_log, dt_bias)
    beta = beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "qk_l2norm": use_qk_l2norm_in_kernel}
    return on_states(
        name,
        ops.chunk_gated_delta_rule,
        (q, k, v, g, beta),
        initial_state,
        output_final_state,
        state_v_first,
        **options,
    )


def layout_of(function: str, v_first: bool, older: bool | None) -> bool:
    """Return `state_v_first`, which may be given by its older name."""
    if older is None:
        return v_first
    if v_first:
        raise ValueError(f"{function}: transpose_state_layout: got it and state_v_first, expected the latter alone")
    warnings.warn(
        f"{function}: transpose_state_layout is deprecated; it is state_v_first now", DeprecationWarning, stacklevel=4
    )
    return older


@answering
@without_gradients
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
    *,
    transpose_state_layout: bool | None = None,
    **others: object,
) -> OutputAndState:
    """Read a few tokens of every sequence, one after the other. As in the original, nothing here has gradients.

    Args:
        g, beta: None: nothing decays, values are written whole. beta may be `(batch, length, v_heads, v_dim)`.
        gk, gv: logs of decays of the keys' channels, `(batch, length, v_heads, k_dim)`, and of the values' ones. With
            gv, or a beta of channels, it is read in torch's own functions, token by token.

    The other arguments are those of `chunk_gated_delta_rule`.
    """
    name = "fused_recurrent_gated_delta_rule"
    refuse(name, **others)
    state_v_first = layout_of(name, state_v_first, transpose_state_layout)
    if g is None and use_gate_in_kernel:
        raise ValueError(f"{name}: g: got None with use_gate_in_kernel, expected what goes through the gate")
    if gv is not None or (beta is not None and beta.dim() == v.dim()):
        g = None if g is None else _decay(name, g, use_gate_in_kernel, A_log, dt_bias)
        beta = None if beta is None else beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
        out, states = by_channel(
            name, (q, k, v), (g, gk, gv, beta), scale, initial_state, use_qk_l2norm_in_kernel, state_v_first, cu_seqlens
        )
        return out, states if output_final_state else None
    g = v.new_zeros(v.shape[:-1]) if g is None else _decay(name, g, use_gate_in_kernel, A_log, dt_bias)
    if beta is None:
        beta = v.new_ones(v.shape[:-1])
        beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    else:
        beta = beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "qk_l2norm": use_qk_l2norm_in_kernel}
    op = ops.gated_delta_rule_update if gk is None else ops.kda_update
    if gk is not None:
        floating(name, gk=gk, g=g)
        if gk.shape != (*g.shape, q.shape[-1]):
            expected = f"{(*g.shape, q.shape[-1])}, as v has heads and q has channels"
            raise ValueError(f"{name}: gk: got shape {tuple(gk.shape)}, expected {expected}")
        g = gk.to(upcast(gk)) + g.unsqueeze(-1)
    return on_states(name, op, (q, k, v, g, beta), initial_state, output_final_state, state_v_first, **options)


def on_states(
    function: str,
    op: Op[...],
    tensors: tuple[Tensor, ...],
    initial: Tensor | None,
    keep: bool,
    v_first: bool,
    *,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> OutputAndState:
    """Run an op on q, k, v, g, beta for a function; return its output, and the last states if they are to be kept."""
    q, _, v, *_ = tensors
    floating(function, q=q)
    if cu_seqlens is not None and q.shape[0] != 1:
        expected = "1: with cu_seqlens all sequences are packed into one row"
        raise ValueError(f"{function}: q: got a batch of {q.shape[0]}, expected {expected}")
    rows, heads = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, v.shape[-2]
    k_dim, v_dim = q.shape[-1], v.shape[-1]
    shape = (rows, heads, v_dim, k_dim)
    check_states(function, "initial_state", initial, shape if v_first else (rows, heads, k_dim, v_dim))
    if initial is not None and not v_first:
        initial = initial.transpose(-1, -2)
    if cu_seqlens is not None:
        tensors, options["cu_seqlens"] = tuple(t.squeeze(0) for t in tensors), cu_seqlens
    states: Tensor | None = None
    if op in (ops.gated_delta_rule_update, ops.kda_update):
        compute, dense = upcast(q), torch.contiguous_format  # as kernels read states: turned here, once
        if initial is None:
            states = q.new_zeros(shape, dtype=compute)
        else:
            states = initial.to(compute, copy=True, memory_format=dense)
        *rest, g, beta = tensors
        out = op(states, *rest, g=g, beta=beta, **options)
    elif initial is None and not keep:
        out = op(*tensors, **options)
    else:
        given: dict[str, Any] = {"cache": "ssm_state", "shape": shape, "dtype": upcast(q)}
        given["initial"] = ("initial_state", initial)
        out, states = with_states(function, op, *tensors, **given, **options)
    if states is not None and not v_first:
        states = states.transpose(-1, -2).contiguous()
    return out if cu_seqlens is None else out.unsqueeze(0), states if keep else None


def _decay(function: str, g: Tensor, raw: bool, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if not raw:
        return g
    if A_log is None:
        raise ValueError(f"{function}: A_log: got None with use_gate_in_kernel, expected a tensor (v_heads,)")
    floating(function, g=g, A_log=A_log, dt_bias=dt_bias)
    g = g.to(upcast(g))
    return -A_log.to(g.dtype).exp() * softplus(g if dt_bias is None else g + dt_bias)


def beta_of(function: str, beta: Tensor, raw: bool, twice: bool) -> Tensor:
    """Return how much of each value is written, given that or its logit."""
    if twice and not raw:
        expected = "it with use_beta_sigmoid_in_kernel, whose sigmoid it doubles"
        raise ValueError(f"{function}: allow_neg_eigval: got True, expected {expected}")
    if not raw:
        return beta
    floating(function, beta=beta)
    return beta.to(upcast(beta)).sigmoid() * (2 if twice else 1)


def naive_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> OutputAndState:
    """Do what `chunk_gated_delta_rule` does, on the backend `torch`; beta comes before g."""
    with use_backend("torch"):
        return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state)


def naive_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> OutputAndState:
    """Do what `chunk_gated_delta_rule` does, on the backend `torch`; `chunk_size` is of no effect."""
    with use_backend("torch"):
        return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state)


@answering
def fused_gdn_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return -exp(A_log) * softplus(g + dt_bias) for g `(..., v_heads)`, the others `(v_heads,)`."""
    return _decay("fused_gdn_gate", g, True, A_log.flatten(), dt_bias).to(output_dtype)
