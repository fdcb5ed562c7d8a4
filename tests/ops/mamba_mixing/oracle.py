"""One Mamba-1 layer's convolution and recurrence on a mixed batch, written from its formulas: token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.exponential import exp
from tests.ops.common.mixing import Convolution, Rounding, rows_of, softplus, wide


def mamba_mixing(
    projected: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_norm_weight: Tensor | None,
    B_norm_weight: Tensor | None,
    C_norm_weight: Tensor | None,
    *plan: Any,
    norm_eps: float = 1e-6,
    null_slot: int = -1,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, state_scale), all new but for the last.

    Computed in `dtype`; with `operands` what the convolution, the two projections and the norms leave is rounded to
    that dtype, as it is where one kernel hands it to the next.
    """
    rounding = Rounding(dtype, operands)
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding)
    states = rounding.copy(wide(ssm_state, state_scale, dtype))
    (inner, dstate), rank = A.shape, dt_proj_weight.shape[1]
    output = rounding.copy(projected.new_zeros(projected.shape[0], inner) if out is None else out).zero_()

    def normed(part: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return part
        return rounding.hand_on(part / (part.square().mean() + norm_eps).sqrt() * weight.to(dtype))

    for row in rows_of(*plan, null_slot=null_slot):
        window = convolution.begin(row)
        s = row.begin(states, dtype)
        for number, token in enumerate(row.tokens):
            x, z = projected[token].split(inner)
            u = window.push(x)
            dt, B, C = rounding.hand_on(x_proj_weight.to(dtype) @ u).split([rank, dstate, dstate])
            dt, B, C = normed(dt, dt_norm_weight), normed(B, B_norm_weight), normed(C, C_norm_weight)
            delta = rounding.hand_on(dt_proj_weight.to(dtype) @ dt)
            d = softplus(delta + dt_proj_bias.to(dtype)).unsqueeze(1)
            s = s * exp(A.to(dtype) * d) + d * u.unsqueeze(1) * B
            z = z.to(dtype)
            output[token] = ((s @ C + D.to(dtype) * u) * z * torch.sigmoid(z)).to(output.dtype)
            row.keep(states, number, s)
        window.end()
    return output, convolution.state, states, state_scale
