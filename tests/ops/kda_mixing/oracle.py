"""One KDA layer's convolution and recurrence on a mixed batch, from its formulas: token by token."""

import functools
from typing import Any

import torch
from torch import Tensor

from tests.ops.chunk_kda.oracle import chunk_step
from tests.ops.common.mixing import Convolution, Rounding, read_in_chunks, rows_of, softplus, wide
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
    rounds_more: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, state_scale), all new but for the last.

    Computed in `dtype`; with `operands` what the convolution leaves is rounded to that dtype, as it is where one kernel
    hands it to the next. With `rounds_more` prefills are computed in chunks, and rounded there too, as in the oracle of
    chunk_kda.
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
        mixed = [window.push(projected[token]).split([K * k_dim, K * k_dim, V * v_dim]) for token in row.tokens]
        window.end()
        if operands is not None and rounds_more and not row.decodes:
            read_in_chunks(row, states, s, mixed, g, beta, output, functools.partial(chunk_step, operands=operands))
            continue
        for number, (token, (q, k, v)) in enumerate(zip(row.tokens, mixed, strict=True)):
            for h in range(V):
                head = slice(h // (V // K) * k_dim, (h // (V // K) + 1) * k_dim)
                query, key = (t[head] / torch.sqrt((t[head] * t[head]).sum() + 1e-6) for t in (q, k))
                value = v[h * v_dim : (h + 1) * v_dim]
                s[h], o = delta_step(s[h], query, key, value, g[token, h], beta[token, h], None, False)
                output[token, h] = o.to(output.dtype)
            row.keep(states, number, s)
    return output, convolution.state, states, state_scale
