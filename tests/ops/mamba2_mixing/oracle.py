"""One Mamba-2 layer's convolution and recurrence on a mixed batch, written from its formulas: token by token."""

import math
from typing import Any

import torch
from torch import Tensor

from tests.ops.common.exponential import exp
from tests.ops.common.mixing import Convolution, Rounding, rows_of, softplus, wide


def mamba2_mixing(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *plan_and_sizes: Any,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, state_scale), all new but for the last.

    Computed in `dtype`; with `operands` what the convolution leaves is rounded to that dtype, as it is where one kernel
    hands it to the next.
    """
    *plan, heads, head_dim, dstate, groups, _ = plan_and_sizes
    rounding = Rounding(dtype, operands)
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding)
    states = rounding.copy(wide(ssm_state, state_scale, dtype))
    output = rounding.copy(projected.new_zeros(projected.shape[0], heads, head_dim) if out is None else out).zero_()
    inner = heads * head_dim
    for row in rows_of(*plan, null_slot=null_slot):
        window = convolution.begin(row)
        s = row.begin(states, dtype)
        for number, token in enumerate(row.tokens):
            _, mixed, dt = projected[token].split([inner, inner + 2 * groups * dstate, heads])
            x, B, C = window.push(mixed).split([inner, groups * dstate, groups * dstate])
            for h in range(heads):
                group = slice(h // (heads // groups) * dstate, (h // (heads // groups) + 1) * dstate)
                u = x[h * head_dim : (h + 1) * head_dim]
                d = softplus(dt[h].to(dtype) + dt_bias[h].to(dtype)).clamp(dt_min, dt_max)
                s[h] = s[h] * exp(A[h].to(dtype) * d) + d * u.unsqueeze(1) * B[group]
                output[token, h] = (s[h] @ C[group] + D[h].to(dtype) * u).to(output.dtype)
            row.keep(states, number, s)
        window.end()
    return output, convolution.state, states, state_scale
