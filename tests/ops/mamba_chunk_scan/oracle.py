"""The recurrence of mamba_chunk_scan, written from its formulas: row by row, head by head, token by token."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from tests.ops.common.exponential import log_decay, sums_between


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    cu_seqlens: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    chunk_states: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    operands: torch.dtype | None = None,
    rounds_more: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (output, ssm_state, chunk_states), None for a cache that is not there; the arguments stay as they are.

    Everything is computed in `dtype`, token by token. With `operands`, chunk by chunk instead, and what chunked kernels
    give to matrix units is rounded to that dtype: the scaled B (with `rounds_more` the scaled x in its place), the
    state before a chunk, and the weights of a chunk's tokens. In float64 the results are float64 too; else they are
    rounded once, to the dtypes of what holds them. What the op does not write is what was there before; without `out`
    that is NaN.
    """
    exact = dtype == torch.float64
    before = torch.full_like(x, torch.nan) if out is None else out
    output = before.to(dtype if exact else before.dtype, copy=True)
    cache, kept = (
        None if t is None or t.numel() == 0 else t.to(dtype if exact else t.dtype, copy=True)
        for t in (ssm_state, chunk_states)
    )
    x, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
    D, z, dt_bias = (None if t is None else t.to(dtype) for t in (D, z, dt_bias))
    heads, dim, dstate = *x.shape[-2:], B.shape[-1]

    def slot_of(table: Tensor | None, row: int) -> int | None:
        """The slot of a row, None for padding."""
        if table is None:
            return row
        slot = int(table[row] if table.dim() == 1 else table[row, 0])
        return None if slot < 0 or slot == null_slot else slot

    chunk = 0
    for row, tokens in enumerate(_tokens_of_rows(x, cu_seqlens)):
        ends = chunk_ends(len(tokens), 0 if num_computed_tokens is None else int(num_computed_tokens[row]), chunk_size)
        first, chunk = chunk, chunk + len(ends)
        source, target = slot_of(slots, row), slot_of(slots if write_slots is None else write_slots, row)
        if source is None:
            for at in tokens:
                output[at] = 0
            continue
        carried = cache is not None and has_initial_state is not None and bool(has_initial_state[row])
        for h in range(heads):
            g = h // (heads // B.shape[-2])
            s = torch.zeros(dim, dstate, dtype=dtype, device=x.device)
            if cache is not None and carried:
                s = ssm_state[source][h].to(dtype)  # type: ignore[index]
            bias = None if dt_bias is None else dt_bias[h]
            for c, (start, end) in enumerate(pairwise([0, *ends])):
                at = tokens[start:end]
                u, b, k = (torch.stack([t[i][head] for i in at]) for t, head in ((x, h), (B, g), (C, g)))
                d = _step_sizes(torch.stack([dt[i][h] for i in at]), bias, dt_softplus, dt_min, dt_max)
                if operands is None:
                    y = []
                    for t in range(len(at)):
                        s = s * torch.exp(log_decay(A[h], d[t])) + d[t] * u[t].unsqueeze(1) * b[t]
                        y.append((s * k[t]).sum(1))
                    y = torch.stack(y)
                else:
                    s, y = chunk_step(s, u, d, A[h], b, k, operands, scales_x=rounds_more)
                if D is not None:
                    y = y + D[h] * u
                if z is not None:
                    gate = torch.stack([z[i][h] for i in at])
                    y = y * (gate * torch.sigmoid(gate))
                for i, value in zip(at, y, strict=True):
                    output[i][h] = value.to(output.dtype)
                if kept is not None:
                    kept[first + c, h] = s.to(kept.dtype)
            if cache is not None and target is not None and (tokens or target != source):
                cache[target, h] = s.to(cache.dtype)
    return output, cache, kept


def chunk_step(
    s: Tensor, u: Tensor, d: Tensor, A: Tensor, b: Tensor, c: Tensor, operands: torch.dtype, *, scales_x: bool
) -> tuple[Tensor, Tensor]:
    """One chunk of one head: the new state, (dim, dstate), and the outputs, without skip and gate."""

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(operands).to(tensor.dtype)

    a = log_decay(A, d)
    since, between = torch.exp(torch.cumsum(a, 0)), torch.exp(sums_between(a))
    weights = (c @ b.T) * between.tril() * d
    y = since.unsqueeze(1) * (c @ rounded(s).T) + rounded(weights.tril()) @ u
    scale = (between[-1] * d).unsqueeze(1)
    pushed = rounded(u * scale).T @ b if scales_x else u.T @ rounded(b * scale)
    return since[-1] * s + pushed, y


def _tokens_of_rows(x: Tensor, cu_seqlens: Tensor | None) -> list[list[tuple[int, ...]]]:
    """For every row the indices of its tokens in x."""
    if cu_seqlens is not None:
        return [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    return [[(row, t) for t in range(x.shape[1])] for row in range(x.shape[0])]


def chunk_ends(tokens: int, computed: int, chunk_size: int) -> list[int]:
    """Where a row's chunks end: at every multiple of chunk_size, counted from the request's start, and at its end."""
    ends = [t for t in range(1, tokens) if (computed + t) % chunk_size == 0]
    return [*ends, tokens] if tokens else []


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, smallest: float, largest: float) -> Tensor:
    d = dt if bias is None else dt + bias
    if softplus:
        d = torch.where(d > 20, d, torch.log1p(torch.exp(d.clamp(max=30))))  # autograd reads both branches
    limited = d.clamp(smallest, largest)
    return torch.where(limited == d, d, limited)  # so that a gradient passes at a limit itself
