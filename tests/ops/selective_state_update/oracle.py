"""The recurrence of selective_state_update, written from its formulas: row by row, token by token, head by head."""

from itertools import pairwise

import torch
from torch import Tensor

from tests.ops.common.exponential import log_decay


def selective_state_update(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    state_scale: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, state, its scales); the arguments stay as they are.

    Everything is computed in `dtype`. In float64 the results are float64 too; else they are rounded once,
    to the dtypes of the output (`out`'s, or x's) and of the state, as a kernel's are. What the op does not write is
    what was there before; without `out` that is NaN. The state is rounded to the nearest, whatever the seed: how it is
    rounded stochastically has an oracle of its own, rounding.py.
    """
    exact = dtype == torch.float64
    if state_scale is not None:
        ssm_state = ssm_state.to(dtype) * state_scale.to(dtype).unsqueeze(-1)
    before = torch.full_like(x, torch.nan) if out is None else out
    output, new_state = (t.to(dtype if exact else t.dtype, copy=True) for t in (before, ssm_state))
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    D, z, dt_bias = (None if t is None else t.to(dtype) for t in (D, z, dt_bias))
    speculative = num_accepted_tokens is not None

    def slot_of(table: Tensor | None, row: int, column: int) -> int | None:
        """The slot in a table's row and column, None for padding."""
        if table is None:
            return row
        slot = int(table[row] if table.dim() == 1 else table[row, column])
        return None if slot < 0 or slot == null_slot else slot

    def columns_of(table: Tensor) -> int:
        return 1 if table.dim() == 1 else table.shape[1]

    def advance(s: Tensor, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The state after the token `at`, and the token's output."""
        gate = None if z is None else z[at]
        if s.dim() == 2:
            return _step(s, x[at], dt[at], A, B[at], C[at], D, gate, dt_bias, dt_softplus)
        heads, groups = s.shape[0], B.shape[-2]
        new_s, y = torch.empty_like(s), torch.empty_like(x[at])
        for h in range(heads):
            g = h // (heads // groups)
            skip, bias = None if D is None else D[h], None if dt_bias is None else dt_bias[h]
            one = None if gate is None else gate[h]
            new_s[h], y[h] = _step(s[h], x[at][h], dt[at][h], A[h], B[at][g], C[at][g], skip, one, bias, dt_softplus)
        return new_s, y

    for row, tokens in enumerate(_tokens_of_rows(x, ssm_state, cu_seqlens)):
        if not tokens:
            continue
        column = 0
        if speculative and slots is not None and num_accepted_tokens is not None:
            column = min(max(int(num_accepted_tokens[row]) - 1, 0), columns_of(slots) - 1)
        source = slot_of(slots, row, column)
        if source is None:
            for at in tokens:
                output[at] = 0
            continue
        targets = slots if write_slots is None else write_slots
        s = ssm_state[source].to(dtype)
        for t, at in enumerate(tokens):
            s, y = advance(s, at)
            output[at] = y.to(output.dtype)
            last = t == len(tokens) - 1
            if speculative and targets is not None and t < columns_of(targets):
                target = slot_of(targets, row, t)
            elif not speculative and last:
                target = slot_of(targets, row, 0)
            else:
                target = None
            if target is not None:
                new_state[target] = s.to(new_state.dtype)
    return output, new_state, torch.empty(0) if state_scale is None else state_scale


def _tokens_of_rows(x: Tensor, ssm_state: Tensor, cu_seqlens: Tensor | None) -> list[list[tuple[int, ...]]]:
    """For every row the indices of its tokens in x."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [[(t,) for t in range(first, last)] for first, last in pairwise(ends)]
    if x.dim() == ssm_state.dim():
        return [[(row, t) for t in range(x.shape[1])] for row in range(x.shape[0])]
    return [[(row,)] for row in range(x.shape[0])]


def _step(
    s: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """One token of one head: s (dim, dstate), x (dim,), B and C (dstate,), the rest as wide as it is."""
    d = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
    d = d.expand(x.shape).unsqueeze(1)
    s = s * torch.exp(log_decay(A, d)) + (B * d) * x.unsqueeze(1)
    y = (s * C).sum(1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * (z * torch.sigmoid(z))
    return s, y
