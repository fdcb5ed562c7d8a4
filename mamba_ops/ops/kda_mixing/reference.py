"""The plain-torch kernel of kda_mixing: its reference, which runs on any device."""

from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops._common.mixing import Batch, batch_of, by_head, require_window
from mamba_ops.ops.causal_conv1d import causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update
from mamba_ops.ops.chunk_kda import chunk_kda
from mamba_ops.ops.kda_mixing.op import Arguments
from mamba_ops.ops.kda_update import kda_update
from mamba_ops.ops.kda_update.reference import kda_gate
from mamba_ops.registry import has_explicit_backend


def kda_mixing(call: Arguments) -> None:
    batch = batch_of("mamba_ops::kda_mixing", call, call.projected.shape[0])
    require_window("mamba_ops::kda_mixing", call)
    here = slice(0, batch.tokens)
    mixed, a, b = call.projected[here], call.a[here].unflatten(1, (call.num_v_heads, call.head_k_dim)), call.b[here]
    by_key = (call.num_k_heads, call.head_k_dim)
    heads = by_key, by_key, (call.num_v_heads, call.head_v_dim)

    def mix(batch: Batch) -> None:
        if (rows := batch.decodes) is not None:
            q, k, v = by_head(rows.convolve(causal_conv1d_update, call, mixed), *heads)
            rows.bind(kda_update)(
                call.ssm_state,
                q,
                k,
                v,
                a=rows.of(a),
                b=rows.of(b),
                A_log=call.A_log,
                dt_bias=call.dt_bias,
                lower_bound=call.lower_bound,
                qk_l2norm=True,
                state_scale=call.state_scale,
                out=rows.of(call.output),
            )
        for prefills in batch.prefills:
            rows, states = prefills.widened(call, mixed)
            q, k, v = by_head(prefills.convolve(causal_conv1d, call, mixed), *heads)
            g = kda_gate(rows.of(a), call.A_log, call.dt_bias, call.lower_bound)
            beta = sigmoid(rows.of(b).to(g.dtype))
            rows.bind(chunk_kda)(q, k, v, g, beta, ssm_state=states.states, qk_l2norm=True, out=rows.of(call.output))
            states.keep()

    if has_explicit_backend(causal_conv1d_update, kda_update, causal_conv1d, chunk_kda):
        mix(batch.check_only())
    mix(batch)
    batch.clear_rest(call.output)
