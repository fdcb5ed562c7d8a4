"""One gated delta net layer's convolution and recurrence on a mixed batch, from its formulas: token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mixing import Convolution, Rounding, rows_of, wide
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
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, z, state_scale), all new but for the last, None for what is not there.

    Computed in `dtype`; with `operands` what the convolution leaves, and the normalised q and k of prefills, are
    rounded to that dtype, as they are where one kernel hands them to the next.
    """
    *plan, K, V, k_dim, v_dim, interleaved = plan_and_sizes
    rounding = Rounding(dtype, operands)
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding)
    states = rounding.copy(wide(ssm_state, state_scale, dtype))
    shape = (projected_qkvz.shape[0], V, v_dim)
    output = rounding.copy(projected_qkvz.new_zeros(shape) if out is None else out).zero_()
    gates = None if z is None else rounding.copy(z).zero_()
    mine = V // K

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
        for number, token in enumerate(row.tokens):
            q, k, v, gate, b, a = apart(projected_qkvz[token], projected_ba[token])
            mixed = window.push(torch.cat([q, k, v]))
            q, k, v = mixed.split([K * k_dim, K * k_dim, V * v_dim])
            for h in range(V):
                head = slice(h // mine * k_dim, (h // mine + 1) * k_dim)
                query, key = (t[head] / torch.sqrt((t[head] * t[head]).sum() + 1e-6) for t in (q, k))
                if row.accepted is None:
                    query, key = rounding.hand_on(query), rounding.hand_on(key)
                g, beta = raw_gates(*(t.to(dtype) for t in (a[h], b[h], A_log[h], dt_bias[h])))
                value = v[h * v_dim : (h + 1) * v_dim]
                s[h], o = delta_step(s[h], query, key, value, g, beta, None, False)
                output[token, h] = o.to(output.dtype)
            if gates is not None:
                gates[token] = gate.view(V, v_dim).to(gates.dtype)
            row.keep(states, number, s)
        window.end()
    if gates is not None and plan[0] is not None:  # tokens of padding rows have a gate, too
        for token in range(int(plan[0][1] + plan[0][3])):
            gates[token] = apart(projected_qkvz[token], projected_ba[token])[3].view(V, v_dim).to(gates.dtype)
    return output, convolution.state, states, gates, state_scale
