"""The recurrence of chunk_gated_delta_rule, written from its formulas: row by row, head by head, token by token."""

from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor

from tests.ops.common.exponential import exp, sums_between
from tests.ops.gated_delta_rule_update.oracle import delta_step


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
    step: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return (output, state), None for a cache that is not there; the arguments stay as they are.

    Everything is computed in `dtype`, token by token. With `operands`, in chunks of 64 tokens instead, and what chunked
    kernels give to matrix units is rounded to that dtype. In float64 the results are float64 too; else they are rounded
    once, to the dtypes of what holds them. What the op does not write is what was there before; without `out` that is
    NaN. A chunk of a head is computed by `step`, `chunk_step` by default.
    """
    exact = dtype == torch.float64
    before = torch.full_like(v, torch.nan) if out is None else out
    output = before.to(dtype if exact else before.dtype, copy=True)
    cache = None if ssm_state is None else ssm_state.to(dtype if exact else ssm_state.dtype, copy=True)
    heads, v_dim, k_dim = *v.shape[-2:], q.shape[-1]

    def slot_of(table: Tensor | None, row: int) -> int | None:
        """The slot of a row, None for padding."""
        if table is None:
            return row
        slot = int(table[row] if table.dim() == 1 else table[row, 0])
        return None if slot < 0 or slot == null_slot else slot

    if cu_seqlens is None:
        rows = [[(row, t) for t in range(v.shape[1])] for row in range(v.shape[0])]
    else:
        rows = [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    for row, tokens in enumerate(rows):
        source, target = slot_of(slots, row), slot_of(slots if write_slots is None else write_slots, row)
        if source is None:
            for at in tokens:
                output[at] = 0
            continue
        S = [torch.zeros(v_dim, k_dim, dtype=dtype)] * heads
        if ssm_state is not None and has_initial_state is not None and has_initial_state[row]:
            S = list(ssm_state[source].to(dtype))
        if operands is not None:
            for h, start in product(range(heads), range(0, len(tokens), 64)):
                at = tokens[start : start + 64]
                query, key = (torch.stack([t[i][h // (heads // q.shape[-2])] for i in at]).to(dtype) for t in (q, k))
                value, decay, much = (torch.stack([t[i][h] for i in at]).to(dtype) for t in (v, g, beta))
                S[h], o = (step or chunk_step)(S[h], query, key, value, decay, much, scale, qk_l2norm, operands)
                for i, y in zip(at, o, strict=True):
                    output[i][h] = y.to(output.dtype)
        for at in tokens if operands is None else []:
            for h in range(heads):
                query, key = (t[at][h // (heads // q.shape[-2])].to(dtype) for t in (q, k))
                value, decay, much = (t[at][h].to(dtype) for t in (v, g, beta))
                S[h], o = delta_step(S[h], query, key, value, decay, much, scale, qk_l2norm)
                output[at][h] = o.to(output.dtype)
        if cache is not None and target is not None and (tokens or target != source):
            cache[target] = torch.stack(S).to(cache.dtype)
    return output, cache


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
        q, k = (rounded(t / torch.sqrt((t * t).sum(1, keepdim=True) + 1e-6)) for t in (q, k))
    scale = q.shape[1] ** -0.5 if scale is None else scale
    G = torch.cumsum(g, 0)
    between = exp(sums_between(g))
    decay = between.tril()
    system = ((k @ k.T) * decay * beta.unsqueeze(1)).tril(-1)
    inverse = rounded(inverse_of(system))
    alone = rounded(inverse @ rounded(v * beta.unsqueeze(1)))
    through = rounded(inverse @ rounded(k * (beta * exp(G)).unsqueeze(1)))
    new = rounded(alone - through @ rounded(S).T)
    out = scale * (exp(G).unsqueeze(1) * (q @ rounded(S).T) + rounded((q @ k.T) * decay) @ new)
    return S * exp(G[-1]) + rounded(new * between[-1].unsqueeze(1)).T @ k, out


def inverse_of(system: Tensor) -> Tensor:
    """That of 1 + system, which is strictly lower triangular."""
    rows = list(torch.eye(len(system), dtype=system.dtype))
    for i in range(1, len(system)):
        rows[i] = rows[i] - system[i, :i] @ torch.stack(rows[:i])
    return torch.stack(rows)
