"""One layer's gated short convolution on a mixed batch, written from its formulas: token by token."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.common.mixing import Convolution, Rounding, rows_of


def short_conv_mixing(
    projected: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *plan: Any,
    null_slot: int = -1,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (output, conv_state), both new.

    Computed in `dtype`; with `operands` what is convolved, and what the convolution leaves, is rounded to that dtype,
    as it is where one kernel hands it to the next.
    """
    rounding, dim = Rounding(dtype, operands), projected.shape[1] // 3
    convolution = Convolution(conv_state, conv_weight, conv_bias, rounding, silu=False)
    output = rounding.copy(projected.new_zeros(projected.shape[0], dim) if out is None else out).zero_()
    for row in rows_of(*plan, null_slot=null_slot, windows_alone=True):
        window = convolution.begin(row)
        for token in row.tokens:
            B, C, x = projected[token].to(dtype).split(dim)
            y = window.push(rounding.hand_on(B * x))
            output[token] = torch.where(y == 0, 0, C * y).to(output.dtype)
        window.end()
    return output, convolution.state
