"""The recurrence of kda_update, written from its formulas."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.gated_delta_rule_update.oracle import gated_delta_rule_update


def kda_update(
    ssm_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    dtype: torch.dtype = torch.float64,
    **rows: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, state, its scales): the loops are those of the gated delta rule, whose states take a
    decay for each column.

    Everything is computed in `dtype`.
    """
    if a is not None and b is not None and A_log is not None and dt_bias is not None:
        d, rate = a.to(dtype) + dt_bias.to(dtype), torch.exp(A_log.to(dtype)).unsqueeze(-1)
        if lower_bound is None:
            g = -rate * torch.where(d > 20, d, torch.log1p(torch.exp(d)))
        else:
            g = lower_bound * torch.sigmoid(rate * d)
        beta = torch.sigmoid(b.to(dtype))
    return gated_delta_rule_update(ssm_state, q, k, v, g=g, beta=beta, dtype=dtype, **rows)
