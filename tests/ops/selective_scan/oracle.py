"""The recurrence of selective_scan, written from its formulas: row by row, token by token."""

from itertools import pairwise

import torch
from torch import Tensor

from tests.ops.common.exponential import exp, log_decay


def selective_scan(
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
    cu_seqlens: Tensor | None = None,
    ssm_state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    null_slot: int = -1,
    block_size: int = 0,
    first_block: Tensor | None = None,
    last_block: Tensor | None = None,
    initial_block: Tensor | None = None,
    chunk_ends: Tensor | None = None,
    last_chunk: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Return (output, ssm_state), None for a cache that is not there; the arguments stay as they are.

    Everything is computed in `dtype`; in float32 a decay is right to 22 bits, as GPUs' exponentials are. In float64 the
    results are float64 too; else they are rounded once, to the dtypes of what holds them. What the op does not write is
    what was there before; without `out` that is NaN.
    """
    exact = dtype == torch.float64
    before = torch.full_like(x, torch.nan) if out is None else out
    output = before.to(dtype if exact else before.dtype, copy=True)
    cache = None if ssm_state is None else ssm_state.to(dtype if exact else ssm_state.dtype, copy=True)
    dim, dstate = A.shape

    def slot_of(table: Tensor | None, row: int, column: int = 0) -> int | None:
        """The slot of a row, None for padding."""
        if table is None:
            return row
        slot = int(table[row] if table.dim() == 1 else table[row, column])
        return None if slot < 0 or slot == null_slot else slot

    if cu_seqlens is None:
        rows = [[(row, t) for t in range(x.shape[1])] for row in range(x.shape[0])]
    else:
        rows = [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    for row, tokens in enumerate(rows):
        source = slot_of(slots, row, 0 if block_size == 0 else int(initial_block[row]))  # type: ignore[index]
        if source is None:
            for at in tokens:
                output[at] = 0
            continue
        s = torch.zeros(dim, dstate, dtype=dtype)
        if cache is not None and has_initial_state is not None and has_initial_state[row]:
            s = ssm_state[source].to(dtype)  # type: ignore[index]
        blocks = (first_block, last_block, chunk_ends, last_chunk)
        columns = {} if block_size == 0 else stored_columns(row, block_size, *blocks)  # type: ignore[arg-type]
        for number, at in enumerate(tokens):
            d = dt[at].to(dtype)
            if dt_bias is not None:
                d = d + dt_bias.to(dtype)
            if dt_softplus:
                d = torch.where(d > 20, d, torch.log1p(torch.exp(d.clamp(max=30))))
            value = x[at].to(dtype)
            b, c = (t[at].to(dtype).view(-1, dstate) for t in (B, C))
            b, c = (t.repeat_interleave(dim // t.shape[0], 0) for t in (b, c))
            s = s * exp(log_decay(A.to(dtype), d.unsqueeze(1))) + d.unsqueeze(1) * b * value.unsqueeze(1)
            y = (s * c).sum(1)
            if D is not None:
                y = y + D.to(dtype) * value
            if z is not None:
                gate = z[at].to(dtype)
                y = y * (gate * torch.sigmoid(gate))
            output[at] = y.to(output.dtype)
            if number + 1 in columns:
                target = slot_of(slots, row, columns[number + 1])
                if target is not None:
                    cache[target] = s.to(cache.dtype)  # type: ignore[index, union-attr]
        target = slot_of(slots if write_slots is None else write_slots, row)
        if cache is not None and block_size == 0 and target is not None and (tokens or target != source):
            cache[target] = s.to(cache.dtype)
    return output, cache


def stored_columns(
    row: int,
    block_size: int,
    first_block: Tensor,
    last_block: Tensor,
    chunk_ends: Tensor,
    last_chunk: Tensor,
) -> dict[int, int]:
    """After how many of a row's tokens its state is stored, and in which column of its slots."""
    first = 0 if row == 0 else int(last_chunk[row - 1]) + 1
    last = int(last_chunk[row])
    ends = [0 if first == 0 else int(chunk_ends[first - 1]), *chunk_ends[first : last + 1].tolist()]
    lengths = [end - start for start, end in pairwise(ends)]
    position = int(first_block[row]) * block_size
    if len(lengths) > 1 and lengths[0] < block_size:
        position += block_size - lengths[0]
    columns, done = {}, 0
    for number, length in enumerate(lengths):
        is_last = number == len(lengths) - 1
        columns[done + length] = int(last_block[row]) if is_last else (position + length - 1) // block_size
        done, position = done + length, position + length
    return columns
