"""The recurrence of gated_delta_rule_update, written from its formulas: row by row, head by head, token by token."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.ops.common.exponential import exp


def gated_delta_rule_update(
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
    scale: float | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, state, its scales), the first two new.

    Everything is computed in `dtype`. In float64 the results are float64 too; else they are rounded once, to the dtypes
    of what holds them. What the op does not write is what was there before; without `out` that is NaN. The
    state is rounded to the nearest, whatever the seed; one with scales is returned as the numbers that it stands for,
    not rounded.
    """
    if state_scale is not None:
        ssm_state = ssm_state.to(dtype) * state_scale.to(dtype).unsqueeze(-1)
    exact = dtype == torch.float64
    before = torch.full_like(v, torch.nan) if out is None else out
    output = before.to(dtype if exact else before.dtype, copy=True)
    after = ssm_state.to(dtype if exact else ssm_state.dtype, copy=True)
    spread = v.shape[-2] // q.shape[-2]

    def slot_of(table: Tensor | None, row: int, column: int) -> int | None:
        """A slot of a row, None for padding or for a column that is not there."""
        if table is None:
            return row if column == 0 else None
        entries = table[row].reshape(-1).tolist()
        slot = entries[column] if column < len(entries) else -1
        return None if slot < 0 or slot == null_slot else slot

    for row, tokens in enumerate(tokens_of_rows(ssm_state, v, cu_seqlens)):
        first = 0
        if num_accepted_tokens is not None and slots is not None:
            columns = 1 if slots.dim() == 1 else slots.shape[1]
            first = min(max(int(num_accepted_tokens[row]) - 1, 0), columns - 1)
        source = slot_of(slots, row, first)
        for number, at in enumerate(tokens):
            if source is None:
                output[at] = 0
                continue
            S = ssm_state[source].to(dtype).clone() if number == 0 else S  # noqa: F821
            for h in range(v.shape[-2]):
                query, key = (t[at][h // spread].to(dtype) for t in (q, k))
                if g is not None and beta is not None:
                    decay, much = g[at][h].to(dtype), beta[at][h].to(dtype)
                else:
                    decay, much = raw_gates(*(t.to(dtype) for t in (a[at][h], b[at][h], A_log[h], dt_bias[h])))  # type: ignore[index]
                S[h], o = delta_step(S[h], query, key, v[at][h].to(dtype), decay, much, scale, qk_l2norm)
                output[at][h] = o.to(output.dtype)
            column = None if num_accepted_tokens is None and number < len(tokens) - 1 else number
            if num_accepted_tokens is None and column is not None:
                column = 0
            if column is not None:
                target = slot_of(slots if write_slots is None else write_slots, row, column)
                if target is not None:
                    after[target] = S.to(after.dtype)
    return output, after, torch.empty(0) if state_scale is None else state_scale


def tokens_of_rows(ssm_state: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> list[list[tuple[int, ...]]]:
    """For every row the indices of its tokens in v."""
    if cu_seqlens is not None:
        return [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    if v.dim() < ssm_state.dim():
        return [[(row,)] for row in range(v.shape[0])]
    return [[(row, t) for t in range(v.shape[1])] for row in range(v.shape[0])]


def raw_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g and beta from what the projections give."""
    d = a + dt_bias
    return -torch.exp(A_log) * torch.where(d > 20, d, torch.log1p(torch.exp(d))), torch.sigmoid(b)


def delta_step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None, l2norm: bool
) -> tuple[Tensor, Any]:
    """One token of one head: the new state, (v_dim, k_dim), and the output."""
    if l2norm:
        q, k = (t / torch.sqrt((t * t).sum() + 1e-6) for t in (q, k))
    q = q * (len(q) ** -0.5 if scale is None else scale)
    S = S * exp(g)
    S = S + torch.outer(beta * (v - S @ k), k)
    return S, S @ q
