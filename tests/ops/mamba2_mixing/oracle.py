"""One Mamba-2 layer's convolution and recurrence on a mixed batch, written from its formulas: token by token."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.ops.common.exponential import exp
from tests.ops.common.mixing import Convolution, Rounding, rows_of, softplus, wide
from tests.ops.mamba_chunk_scan.oracle import chunk_ends, chunk_step


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
    rounds_more: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return (output, conv_state, ssm_state, state_scale), all new but for the last.

    Computed in `dtype`; with `operands` what the convolution leaves is rounded to that dtype, as it is where one kernel
    hands it to the next. With `rounds_more` prefills are computed in chunks, and rounded there too, as in the oracle of
    mamba_chunk_scan.
    """
    *plan, heads, head_dim, dstate, groups, chunk_size = plan_and_sizes
    rounding = Rounding(dtype, operands)
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding)
    states = rounding.copy(wide(ssm_state, state_scale, dtype))
    output = rounding.copy(projected.new_zeros(projected.shape[0], heads, head_dim) if out is None else out).zero_()
    inner = heads * head_dim
    for row in rows_of(*plan, null_slot=null_slot):
        window = convolution.begin(row)
        s = row.begin(states, dtype)
        chunks = [(t, t + 1) for t in range(len(row.tokens))]
        if is_chunked := operands is not None and rounds_more and not row.decodes:
            chunks = [*pairwise([0, *chunk_ends(len(row.tokens), row.computed, chunk_size)])]
        for start, end in chunks:
            tokens = row.tokens[start:end]
            _, mixed, dt = projected[tokens.start : tokens.stop].split([inner, inner + 2 * groups * dstate, heads], 1)
            x, B, C = torch.stack([window.push(t) for t in mixed]).split([inner, groups * dstate, groups * dstate], 1)
            for h in range(heads):
                group = slice(h // (heads // groups) * dstate, (h // (heads // groups) + 1) * dstate)
                u, b, c = x[:, h * head_dim : (h + 1) * head_dim], B[:, group], C[:, group]
                d = softplus(dt[:, h].to(dtype) + dt_bias[h].to(dtype)).clamp(dt_min, dt_max)
                if is_chunked:
                    s[h], y = chunk_step(s[h], u, d, A[h].to(dtype), b, c, operands, scales_x=True)
                else:
                    s[h] = s[h] * exp(A[h].to(dtype) * d) + d * u.mT * b
                    y = c @ s[h].mT
                output[tokens.start : tokens.stop, h] = (y + D[h].to(dtype) * u).to(output.dtype)
            row.keep(states, end - 1, s)
        window.end()
    return output, convolution.state, states, state_scale
