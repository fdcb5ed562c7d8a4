"""One gated delta net layer's convolution and recurrence on a mixed batch, from its formulas: token by token."""

import functools
from typing import Any

import torch
from torch import Tensor

from tests.ops.chunk_gated_delta_rule.oracle import chunk_step
from tests.ops.common.mixing import Convolution, Rounding, read_in_chunks, rows_of, wide
from tests.ops.gated_delta_rule_update.oracle import delta_step, raw_gates


def gdn_mixing(
    projected_qkvz: Tensor,
    projected_ba: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    *plan_and_sizes: Any,
    z: Tensor | None = None,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
    rounds_more: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, z, state_scale), all new but for the last, None for what is not there.

    Computed in `dtype`; with `operands` what the convolution leaves is rounded to that dtype, as it is where one kernel
    hands it to the next. With `rounds_more` prefills are computed in chunks, and rounded there too, as in the oracle of
    chunk_gated_delta_rule.
    """
    *plan, K, V, k_dim, v_dim, interleaved = plan_and_sizes
    rounding = Rounding(dtype, operands)
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding)
    states = rounding.copy(wide(ssm_state, state_scale, dtype))
    shape = (projected_qkvz.shape[0], V, v_dim)
    output = rounding.copy(projected_qkvz.new_zeros(shape) if out is None else out).zero_()
    gates = None if z is None else rounding.copy(z).zero_()
    mine = V // K
    g, beta = (torch.zeros(shape[:2], dtype=dtype) for _ in range(2))

    def apart(qkvz: Tensor, ba: Tensor) -> list[Tensor]:
        """q, k, v, gate, b and a of one token, each flat."""
        if not interleaved:
            return [*qkvz.split([K * k_dim, K * k_dim, V * v_dim, V * v_dim]), *ba.split(V)]
        found: list[list[Tensor]] = [[], [], [], [], [], []]
        for h in range(K):
            own = qkvz[h * 2 * (k_dim + mine * v_dim) :]
            start = 0
            for part, size in enumerate((k_dim, k_dim, mine * v_dim, mine * v_dim)):
                found[part].append(own[start : start + size])
                start += size
            found[4].append(ba[2 * mine * h : 2 * mine * h + mine])
            found[5].append(ba[2 * mine * h + mine : 2 * mine * (h + 1)])
        return [torch.cat(part) for part in found]

    for row in rows_of(*plan, null_slot=null_slot):
        window = convolution.begin(row)
        s = row.begin(states, dtype)
        mixed = []
        for token in row.tokens:
            q, k, v, gate, b, a = apart(projected_qkvz[token], projected_ba[token])
            mixed.append(window.push(torch.cat([q, k, v])).split([K * k_dim, K * k_dim, V * v_dim]))
            g[token], beta[token] = raw_gates(*(t.to(dtype) for t in (a, b, A_log, dt_bias)))
            if gates is not None:
                gates[token] = gate.view(V, v_dim).to(gates.dtype)
        window.end()
        if operands is not None and rounds_more and not row.decodes:
            read_in_chunks(row, states, s, mixed, g, beta, output, functools.partial(chunk_step, operands=operands))
            continue
        for number, (token, (q, k, v)) in enumerate(zip(row.tokens, mixed, strict=True)):
            for h in range(V):
                head = slice(h // mine * k_dim, (h // mine + 1) * k_dim)
                query, key = (t[head] / torch.sqrt((t[head] * t[head]).sum() + 1e-6) for t in (q, k))
                value = v[h * v_dim : (h + 1) * v_dim]
                s[h], o = delta_step(s[h], query, key, value, g[token, h], beta[token, h], None, False)
                output[token, h] = o.to(output.dtype)
            row.keep(states, number, s)
    if gates is not None and plan[0] is not None:  # tokens of padding rows have a gate, too
        for token in range(int(plan[0][1] + plan[0][3])):
            gates[token] = apart(projected_qkvz[token], projected_ba[token])[3].view(V, v_dim).to(gates.dtype)
    return output, convolution.state, states, gates, state_scale
