"""One KDA layer's convolution and recurrence on a mixed batch, from its formulas: token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mixing import Convolution, Rounding, rows_of, softplus, wide
from tests.ops.gated_delta_rule_update.oracle import delta_step


def kda_mixing(
    projected: Tensor,
    a: Tensor,
    b: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    *plan_and_sizes: Any,
    lower_bound: float | None = None,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, state_scale), all new but for the last.

    Computed in `dtype`; with `operands` what the convolution leaves, and the normalised q and k of prefills, are
    rounded to that dtype, as they are where one kernel hands them to the next.
    """
    *plan, K, V, k_dim, v_dim = plan_and_sizes
    rounding = Rounding(dtype, operands)
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding)
    states = rounding.copy(wide(ssm_state, state_scale, dtype))
    shape = (projected.shape[0], V, v_dim)
    output = rounding.copy(projected.new_zeros(shape) if out is None else out).zero_()
    d = a.to(dtype).view(-1, V, k_dim) + dt_bias.to(dtype)
    rate, beta = torch.exp(A_log.to(dtype)).unsqueeze(1), torch.sigmoid(b.to(dtype))
    g = -rate * softplus(d) if lower_bound is None else lower_bound * torch.sigmoid(rate * d)

    for row in rows_of(*plan, null_slot=null_slot):
        window = convolution.begin(row)
        s = row.begin(states, dtype)
        for number, token in enumerate(row.tokens):
            q, k, v = window.push(projected[token]).split([K * k_dim, K * k_dim, V * v_dim])
            for h in range(V):
                head = slice(h // (V // K) * k_dim, (h // (V // K) + 1) * k_dim)
                query, key = (t[head] / torch.sqrt((t[head] * t[head]).sum() + 1e-6) for t in (q, k))
                if row.accepted is None:
                    query, key = rounding.hand_on(query), rounding.hand_on(key)
                value = v[h * v_dim : (h + 1) * v_dim]
                s[h], o = delta_step(s[h], query, key, value, g[token, h], beta[token, h], None, False)
                output[token, h] = o.to(output.dtype)
            row.keep(states, number, s)
        window.end()
    return output, convolution.state, states, state_scale
