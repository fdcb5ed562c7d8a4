"""The functions of flash-linear-attention 0.6 for Kimi Delta Attention, over our ops.

Layouts of states are as for the gated delta rule.
"""

from typing import Any

import torch
from torch import Tensor

from mamba_ops import ops
from mamba_ops.compat.arguments import floating, refuse, without_gradients
from mamba_ops.compat.fla.delta_rule import OutputAndState, beta_of, layout_of, on_states
from mamba_ops.ops.kda_update.reference import kda_gate
from mamba_ops.registry import answering, use_backend


@answering
def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: object = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int = 64,
    transpose_state_layout: bool | None = None,
    **others: object,
) -> OutputAndState:
    """Read sequences with Kimi Delta Attention; return their output and, if asked for, their last states in float32.

    Differentiable: q, k, v, g, beta, A_log, dt_bias and initial_state; last states have gradients too.

    Args:
        q, k: `(batch, length, k_heads, k_dim)`; with `cu_seqlens` batch is 1.
        v: `(batch, length, v_heads, v_dim)`.
        g: `(batch, length, v_heads, k_dim)`: the logs of the decays, or their gate (`use_gate_in_kernel`).
        beta: `(batch, length, v_heads)`: how much of a value is written, or its logit (`use_beta_sigmoid_in_kernel`).
        scale: of q; None: k_dim ** -0.5.
        initial_state: `(n, v_heads, k_dim, v_dim)`. Not changed.
        output_final_state: whether to return the last states.
        use_qk_l2norm_in_kernel: whether q and k are normalised.
        use_gate_in_kernel: whether g is the input of a gate, as `fused_kda_gate` has it, with `A_log`, `dt_bias` and
            `lower_bound`, which are of no effect otherwise.
        use_beta_sigmoid_in_kernel: whether sigmoid is applied to beta.
        allow_neg_eigval: whether that is twice the sigmoid.
        safe_gate: of no effect but that a gate then needs a `lower_bound`, from -5 to 0: any decay is safe here.
        lower_bound: of the gate, below 0; None: there is none.
        disable_recompute, cu_seqlens_cpu, use_graph, max_num_seqs: of no effect: every call can be captured.
        state_v_first: whether states are `(n, v_heads, v_dim, k_dim)`.
        cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        return_intermediate_states, cp_context, others: refused.
        chunk_size: 32 or 64, and of no effect on what is computed.
        transpose_state_layout: the older name of `state_v_first`, deprecated.
    """
    name = "chunk_kda"
    refuse(name, return_intermediate_states=return_intermediate_states, cp_context=cp_context, **others)
    if chunk_size not in (32, 64):
        raise ValueError(f"{name}: chunk_size: got {chunk_size}, expected 32 or 64")
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(f"{name}: lower_bound: got {lower_bound}, expected -5 to 0 with safe_gate")
    state_v_first = layout_of(name, state_v_first, transpose_state_layout)
    g = _gate(name, g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    beta = beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "qk_l2norm": use_qk_l2norm_in_kernel}
    tensors = q, k, v, g, beta
    return on_states(name, ops.chunk_kda, tensors, initial_state, output_final_state, state_v_first, **options)


@answering
@without_gradients
def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    transpose_state_layout: bool | None = None,
    **others: object,
) -> OutputAndState:
    """Read a few tokens of every sequence, one after the other. As in the original, nothing here has gradients.

    The arguments are those of `chunk_kda`.
    """
    name = "fused_recurrent_kda"
    refuse(name, **others)
    state_v_first = layout_of(name, state_v_first, transpose_state_layout)
    g = _gate(name, g, A_log, dt_bias, lower_bound) if use_gate_in_kernel else g
    beta = beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "qk_l2norm": use_qk_l2norm_in_kernel}
    tensors = q, k, v, g, beta
    return on_states(name, ops.kda_update, tensors, initial_state, output_final_state, state_v_first, **options)


def _gate(function: str, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    if A_log is None and lower_bound is None:
        expected = "a tensor (v_heads,), or a lower_bound"
        raise ValueError(f"{function}: A_log: got None with use_gate_in_kernel, expected {expected}")
    floating(function, g=g, A_log=A_log, dt_bias=dt_bias)
    if lower_bound is not None and not -torch.inf < lower_bound < 0:
        raise ValueError(f"{function}: lower_bound: got {lower_bound}, expected a number below 0, or None")
    heads = g.shape[-2:]
    for name, tensor, numbers in (("A_log", A_log, heads[0]), ("dt_bias", dt_bias, heads.numel())):
        if tensor is not None and tensor.numel() != numbers:
            got = f"got shape {tuple(tensor.shape)}, expected {numbers} numbers"
            raise ValueError(f"{function}: {name}: {got}, as g has the heads {tuple(heads)}")
    rates = g.new_zeros(heads[0]) if A_log is None else A_log.flatten()
    bias = g.new_zeros(heads) if dt_bias is None else dt_bias.view(heads)
    return kda_gate(g, rates, bias, lower_bound)


@answering
def fused_kda_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return -exp(A_log) * softplus(g + dt_bias), or lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).

    Args:
        g: `(..., v_heads, k_dim)`.
        A_log: `(v_heads,)`; None, with a `lower_bound` alone: zeros.
        dt_bias: `(v_heads * k_dim,)`; None: zeros.
        lower_bound: below 0; None: the first of the two.
        output_dtype: of what is returned.
    """
    return _gate("fused_kda_gate", g, A_log, dt_bias, lower_bound).to(output_dtype)


def naive_kda_gate(
    g: Tensor, A_log: Tensor, dt_bias: Tensor | None = None, output_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Do what `fused_kda_gate` does without a lower bound."""
    return fused_kda_gate(g, A_log, dt_bias, None, output_dtype)


def naive_kda_lowerbound_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float = -5.0,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Do what `fused_kda_gate` does with a lower bound."""
    return fused_kda_gate(g, A_log, dt_bias, lower_bound, output_dtype)


def naive_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> OutputAndState:
    """Do what `chunk_kda` does, on the backend `torch`."""
    with use_backend("torch"):
        return chunk_kda(q, k, v, g, beta, scale, initial_state, output_final_state)


def naive_chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
) -> OutputAndState:
    """Do what `chunk_kda` does, on the backend `torch`; `chunk_size` is of no effect."""
    return naive_recurrent_kda(q, k, v, g, beta, scale, initial_state, output_final_state)
