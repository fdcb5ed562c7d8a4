"""The plain-torch kernel of gdn_mixing: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.mixing import Batch, batch_of, by_head, require_window
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from mamba_ops.ops.gated_delta_rule_update import gated_delta_rule_update
from mamba_ops.ops.gated_delta_rule_update.reference import delta_rule_gates
from mamba_ops.ops.gdn_mixing.op import Arguments
from mamba_ops.registry import has_explicit_backend


def unpack(
    qkvz: Tensor,
    ba: Tensor,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what is convolved (all q, all k, all v), the gate by head, b and a. Views, but for what is interleaved.

    Args:
        qkvz, ba: the two projections, `(..., 2 * keys + 2 * values)` and `(..., 2 * num_v_heads)`.
        num_k_heads, num_v_heads, head_k_dim, head_v_dim, interleaved: as for `gdn_mixing`.
    """
    if not interleaved:
        dim, values = 2 * num_k_heads * head_k_dim + num_v_heads * head_v_dim, num_v_heads * head_v_dim
        mixed, z = qkvz.split([dim, values], dim=-1)
        b, a = ba.chunk(2, dim=-1)
        return mixed, z.unflatten(-1, (num_v_heads, head_v_dim)), b, a
    of_one = num_v_heads // num_k_heads
    parts = [head_k_dim, head_k_dim, of_one * head_v_dim, of_one * head_v_dim]
    q, k, v, z = qkvz.unflatten(-1, (num_k_heads, sum(parts))).split(parts, dim=-1)
    b, a = ba.unflatten(-1, (num_k_heads, 2 * of_one)).chunk(2, dim=-1)
    mixed = torch.cat([q.flatten(-2), k.flatten(-2), v.flatten(-2)], dim=-1)
    return mixed, z.reshape(*z.shape[:-2], num_v_heads, head_v_dim), b.flatten(-2), a.flatten(-2)


def gdn_mixing(call: Arguments) -> None:
    batch = batch_of("mamba_ops::gdn_mixing", call, call.projected_qkvz.shape[0])
    require_window("mamba_ops::gdn_mixing", call)
    sizes = (call.num_k_heads, call.num_v_heads, call.head_k_dim, call.head_v_dim)
    here = slice(0, batch.tokens)
    mixed, gate, b, a = unpack(call.projected_qkvz[here], call.projected_ba[here], *sizes, call.interleaved)
    by_key = (call.num_k_heads, call.head_k_dim)
    heads = by_key, by_key, (call.num_v_heads, call.head_v_dim)

    def mix(batch: Batch) -> None:
        if (rows := batch.decodes) is not None:
            q, k, v = by_head(rows.convolve(causal_conv1d_update, call, mixed), *heads)
            rows.bind(gated_delta_rule_update)(
                call.ssm_state,
                q,
                k,
                v,
                a=rows.of(a),
                b=rows.of(b),
                A_log=call.A_log,
                dt_bias=call.dt_bias,
                qk_l2norm=True,
                state_scale=call.state_scale,
                out=rows.of(call.output),
            )
        for prefills in batch.prefills:
            rows, states = prefills.widened(call, mixed)
            q, k, v = by_head(prefills.convolve(causal_conv1d, call, mixed), *heads)
            g, beta = delta_rule_gates(rows.of(a), rows.of(b), call.A_log, call.dt_bias)
            rows.bind(chunk_gated_delta_rule)(
                q, k, v, g, beta, ssm_state=states.states, qk_l2norm=True, out=rows.of(call.output)
            )
            states.keep()

    if has_explicit_backend(causal_conv1d_update, gated_delta_rule_update, causal_conv1d, chunk_gated_delta_rule):
        mix(batch.check_only())
    mix(batch)
    batch.clear_rest(call.output)
    if call.z is not None:
        call.z[here].copy_(gate)
        batch.clear_rest(call.z)
