"""The recurrence of chunk_kda, written from its formulas."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.chunk_gated_delta_rule.oracle import chunk_gated_delta_rule, inverse_of
from tests.ops.common.exponential import exp, sums_between


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
    **rows: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return (output, state): the loops are those of the gated delta rule, whose states take a decay for each column.

    Everything is computed in `dtype`, token by token. With `operands`, in chunks of 64 tokens instead, and what chunked
    kernels give to matrix units is rounded to that dtype.
    """
    return chunk_gated_delta_rule(q, k, v, g, beta, dtype=dtype, operands=operands, step=chunk_step, **rows)


def chunk_step(
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    l2norm: bool,
    operands: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """One chunk of one head: the new state, (v_dim, k_dim), and the outputs."""

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(operands).to(tensor.dtype)

    if l2norm:
        q, k = (t / torch.sqrt((t * t).sum(1, keepdim=True) + 1e-6) for t in (q, k))
    between = exp(sums_between(g))  # (tokens, tokens, k_dim)

    def products(x: Tensor) -> Tensor:
        return (rounded(x.unsqueeze(1) * between) * rounded(k)).sum(2)

    scale = q.shape[1] ** -0.5 if scale is None else scale
    since, left = exp(torch.cumsum(g, 0)), between[-1]
    inverse = rounded(inverse_of((products(k) * beta.unsqueeze(1)).tril(-1)))
    alone = rounded(inverse @ rounded(v * beta.unsqueeze(1)))
    through = rounded(inverse @ rounded(k * since * beta.unsqueeze(1)))
    new = rounded(alone - through @ rounded(S).T)
    weights = rounded(products(scale * q).tril())
    return S * since[-1] + new.T @ rounded(k * left), rounded(scale * q * since) @ rounded(S).T + weights @ new
