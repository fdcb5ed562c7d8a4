"""vLLM's functions for the gated delta rule, and its gated norm, over our ops; states have v_dim before k_dim.

Rows whose slot is 0 or negative are padding: their output is zero, where vLLM leaves it as it was in some of these.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mamba_ops import ops
from mamba_ops.compat.arguments import floating, refuse, upcast, written
from mamba_ops.compat.fla import delta_rule
from mamba_ops.compat.fla.norms import GATES, l2norm
from mamba_ops.layers.norms import rms_norm
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
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    chunk_offsets: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    core_attn_out: Tensor | None = None,
) -> OutputAndState:
    """Read sequences; return their output and, if asked for, their last states in float32.

    Args:
        q, k: `(batch, length, k_heads, k_dim)`; with `cu_seqlens` batch is 1.
        v: `(batch, length, v_heads, v_dim)`.
        g, beta: `(batch, length, v_heads)`: the log of the decay, and how much of a value is written.
        scale: of q; None: k_dim ** -0.5.
        initial_state: `(n, v_heads, v_dim, k_dim)`. Not changed.
        output_final_state: whether to return the last states.
        cu_seqlens: int `(n + 1,)`.
        chunk_indices, chunk_offsets: of no effect: they follow from `cu_seqlens`.
        use_qk_l2norm_in_kernel: whether q and k are normalised.
        core_attn_out: where the output goes, of at least as many numbers, in its first ones. Mutated.
    """
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": initial_state}
    written("chunk_gated_delta_rule", inputs, core_attn_out=core_attn_out)
    states: dict[str, Any] = {"initial_state": initial_state, "output_final_state": output_final_state}
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
    out, last = delta_rule.chunk_gated_delta_rule(q, k, v, g, beta, scale, state_v_first=True, **states, **options)
    if core_attn_out is not None:
        out = core_attn_out.view(-1)[: v.numel()].view(v.shape).copy_(out)
    return out, last


@answering
def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> OutputAndState:
    """Read a few tokens of every row; return their output and the states.

    Args:
        q, k, v, g, scale, cu_seqlens, use_qk_l2norm_in_kernel: as for `chunk_gated_delta_rule`.
        beta: `(batch, length, v_heads)`; None: ones.
        initial_state: `(slots, v_heads, v_dim, k_dim)`; must be given. Mutated with `inplace_final_state`: the state
            after token t of a row goes to the slot in column t.
        inplace_final_state: see above; else the states after all tokens are returned, `(tokens, ...)`.
        ssm_state_indices: int `(n,)`, of rows of one token, or `(n, columns)`. With `inplace_final_state` it must be
            given; None: row i has slot i.
        num_accepted_tokens: int `(n,)`: the column that a row goes on from, less one.
    """
    beta = v.new_ones(v.shape[:-1]) if beta is None else beta
    gates: dict[str, Any] = {"g": g, "beta": beta}
    name = "fused_recurrent_gated_delta_rule"
    options: dict[str, Any] = {"scale": scale, "qk_l2norm": use_qk_l2norm_in_kernel}
    rows = (cu_seqlens, ssm_state_indices, num_accepted_tokens)
    return _advance(name, (q, k, v), gates, initial_state, inplace_final_state, rows, options)


@answering
def fused_sigmoid_gating_delta_rule_update(
    A_log: Tensor,
    a: Tensor,
    b: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    inplace_final_state: bool = True,
    cu_seqlens: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    is_kda: bool = False,
) -> OutputAndState:
    """Do what `fused_recurrent_gated_delta_rule` does, with g = -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b).

    Args:
        A_log, dt_bias: `(v_heads,)`.
        a, b: `(tokens, v_heads)`.
        beta, threshold: of softplus.
        is_kda: refused.
        q, k, v, scale, initial_state, inplace_final_state, cu_seqlens, ssm_state_indices, num_accepted_tokens,
            use_qk_l2norm_in_kernel: as for `fused_recurrent_gated_delta_rule`.
    """
    name = "fused_sigmoid_gating_delta_rule_update"
    refuse(name, is_kda=is_kda)
    shape = v.shape[:-1]
    gates: dict[str, Any]
    if (beta, threshold) == (1.0, 20.0):
        gates = {"a": a.view(shape), "b": b.view(shape), "A_log": A_log, "dt_bias": dt_bias}
    else:
        compute = upcast(a)
        step = softplus(a.to(compute) + dt_bias.to(compute), beta, threshold)
        gates = {"g": (-A_log.to(compute).exp() * step).view(shape), "beta": b.to(compute).sigmoid().view(shape)}
    options: dict[str, Any] = {"scale": scale, "qk_l2norm": use_qk_l2norm_in_kernel}
    rows = (cu_seqlens, ssm_state_indices, num_accepted_tokens)
    return _advance(name, (q, k, v), gates, initial_state, inplace_final_state, rows, options)


def _advance(
    function: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    gates: dict[str, Any],
    state: Tensor | None,
    in_place: bool,
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    options: dict[str, Any],
) -> OutputAndState:
    cu_seqlens, slots, accepted = rows
    if state is None:
        raise ValueError(f"{function}: initial_state: got None, expected the cache (slots, v_heads, v_dim, k_dim)")
    if in_place and slots is None:
        raise ValueError(f"{function}: ssm_state_indices: got None with inplace_final_state, expected the rows' slots")
    floating(function, v=inputs[2], initial_state=state)
    batch, length = inputs[2].shape[:2]
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"{function}: v: got a batch of {batch}, expected 1, as the rows are packed")
        inputs = tuple(t.squeeze(0) for t in inputs)  # type: ignore[assignment]
        gates = {name: t if name in ("A_log", "dt_bias") else t.squeeze(0) for name, t in gates.items()}
    n = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    several = cu_seqlens is not None or length > 1
    if accepted is None and several and (not in_place or (slots is not None and slots.dim() == 2)):
        accepted = torch.ones(n, dtype=torch.int32, device=state.device)  # so that each token's state is stored
    kept, write_slots, null_slot = state, None, 0
    if not in_place:
        kept, slots, write_slots, accepted = _of_all_tokens(state, slots, accepted, n, batch * length, cu_seqlens)
        null_slot = -1
    q, k, v = inputs
    out = ops.gated_delta_rule_update(
        kept,
        q,
        k,
        v,
        **gates,
        **options,
        slots=slots,
        write_slots=write_slots,
        cu_seqlens=cu_seqlens,
        num_accepted_tokens=accepted,
        null_slot=null_slot,
    )
    out = out if cu_seqlens is None else out.unsqueeze(0)
    return out.to(q.dtype), state if in_place else kept[n:]


def _of_all_tokens(
    state: Tensor, slots: Tensor | None, accepted: Tensor | None, n: int, tokens: int, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return a cache of the rows' states and then of all tokens', and where in it each row reads and writes."""
    device = state.device
    row = torch.arange(n, device=device)
    source = row if slots is None else (slots if slots.dim() == 2 else slots.unsqueeze(1))[:n].long()
    if source.dim() == 2:
        column = torch.zeros_like(row) if accepted is None else accepted.long() - 1
        source = source.gather(1, column.clamp(0, source.shape[1] - 1).unsqueeze(1)).squeeze(1)
    is_there = torch.ones_like(row, dtype=torch.bool) if slots is None else source > 0
    begun = torch.where(is_there.view(-1, 1, 1, 1), state[torch.where(is_there, source, 0)], 0)
    begins = row * (tokens // max(n, 1)) if cu_seqlens is None else cu_seqlens[:-1].long()
    columns = max(tokens // max(n, 1), 1) if cu_seqlens is None else max(tokens, 1)
    places = begins.unsqueeze(1) + torch.arange(columns, device=device)
    ends = begins + columns if cu_seqlens is None else cu_seqlens[1:].long()
    targets = torch.where(places < ends.unsqueeze(1), n + places, -1)
    several = accepted is not None
    kept = torch.cat((begun, state.new_zeros(tokens, *state.shape[1:])))
    own = torch.where(is_there, row, -1)
    ones = torch.ones(n, dtype=torch.int32, device=device)
    return kept, own.unsqueeze(1), targets, ones if several else None


@answering
def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    scale: float | None,
    initial_state: Tensor,
    out: Tensor,
    ssm_state_indices: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Read one token a row, q, k and v of which lie together; return `out` and the cache.

    Args:
        mixed_qkv: `(n, 2 * k_heads * k_dim + v_heads * v_dim)`.
        a, b, A_log, dt_bias, scale, use_qk_l2norm_in_kernel: as for `fused_sigmoid_gating_delta_rule_update`.
        initial_state: `(slots, v_heads, v_dim, k_dim)`. Mutated.
        out: `(n, 1, v_heads, v_dim)`. Mutated.
        ssm_state_indices: int `(n,)`.
    """
    _, v_heads, v_dim, k_dim = initial_state.shape
    keys, rest = divmod(mixed_qkv.shape[-1] - v_heads * v_dim, 2)
    if rest or keys <= 0 or keys % k_dim:
        expected = f"{v_heads} * {v_dim} of v, and twice as many of q and k as whole heads of {k_dim}"
        raise ValueError(
            "fused_recurrent_gated_delta_rule_packed_decode: mixed_qkv: got "
            f"{mixed_qkv.shape[-1]} channels, expected {expected}"
        )
    q, k, v = mixed_qkv.split([keys, keys, v_heads * v_dim], dim=-1)
    ops.gated_delta_rule_update(
        initial_state,
        q.unflatten(-1, (-1, k_dim)),
        k.unflatten(-1, (-1, k_dim)),
        v.unflatten(-1, (v_heads, v_dim)),
        a=a,
        b=b,
        A_log=A_log,
        dt_bias=dt_bias,
        scale=scale,
        slots=ssm_state_indices,
        qk_l2norm=use_qk_l2norm_in_kernel,
        null_slot=0,
        out=out.squeeze(1),
    )
    return out, initial_state


@answering
def fused_post_conv_prep(
    conv_output: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    apply_l2norm: bool = True,
    output_g_exp: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v, and g and beta in float32, of what a convolution gives.

    Args:
        conv_output: `(tokens, 2 * num_k_heads * head_k_dim + v_heads * head_v_dim)`.
        a, b: `(tokens, v_heads)`.
        A_log, dt_bias: `(v_heads,)`.
        num_k_heads, head_k_dim, head_v_dim: sizes.
        apply_l2norm: whether q and k are normalised.
        output_g_exp: whether g is the decay, and not its log.
    """
    floating("fused_post_conv_prep", conv_output=conv_output, a=a, b=b, A_log=A_log, dt_bias=dt_bias)
    keys = num_k_heads * head_k_dim
    q, k, v = conv_output.split([keys, keys, conv_output.shape[-1] - 2 * keys], dim=-1)
    heads = [t.unflatten(-1, (-1, head_k_dim)).contiguous() for t in (q, k)]
    if apply_l2norm:
        heads = [l2norm(t) for t in heads]
    g = -A_log.float().exp() * softplus(a.float() + dt_bias.float())
    values = v.unflatten(-1, (-1, head_v_dim)).contiguous()
    return heads[0], heads[1], values, g.exp() if output_g_exp else g, b.float().sigmoid()


class RMSNormGated(nn.Module):
    """A gated RMS norm with vLLM's constructor."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "swish",
    ) -> None:
        super().__init__()
        if activation not in GATES:
            expected = ", ".join(map(repr, GATES))
            raise ValueError(f"RMSNormGated: activation: got {activation!r}, expected {expected}")
        self.eps, self.group_size, self.norm_before_gate, self.activation = (
            eps, group_size, norm_before_gate, activation
        )  # fmt: skip
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise `x` in groups of its last axis, with the gate `z` where there is one."""
        groups = 1 if self.group_size is None else x.unflatten(-1, (-1, self.group_size)).shape[-2]
        options = {"norm_before_gate": self.norm_before_gate, "sigmoid_gate": self.activation == "sigmoid"}
        return rms_norm(x, self.weight, self.eps, gate=z, groups=groups, **options)
