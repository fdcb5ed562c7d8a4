"""The gated delta rules over whole sequences in plain torch, chunk by chunk, whatever decays what."""

from typing import Any, Protocol

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import before, carried, chunk_layout, row_count
from mamba_ops.ops._common.delta_rule import CHUNK, EPS, PrefillArguments
from mamba_ops.ops._common.slots import initial_states, row_ends, store_rows


class Decays(Protocol):
    """What a chunk's tokens keep of each other, and the state of it. Made of the logs of decays, as gathered.

    Attributes:
        since: (pieces, v_heads, CHUNK, 1 or k_dim), the decay up to each token, with its own.
        left: likewise, the decay after each token.
    """

    since: Tensor
    left: Tensor

    def __init__(self, log_decay: Tensor, per_key: int) -> None:
        """Take logs, (pieces, v_heads, CHUNK, ...), and how many heads of v share one of k."""

    def products(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the products of keys i with keys j before them, and of queries i with keys j up to theirs, decayed.

        Both (pieces, v_heads, CHUNK, CHUNK), of (pieces, k_heads, CHUNK, k_dim).
        """


def normalised(x: Tensor) -> Tensor:
    """Return every head of q or k divided by its length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


_PART = 16
"""Tokens of a part of a chunk, whose system is inverted alone."""


def _inverses_of_parts(system: Tensor) -> Tensor:
    """Return the inverses of 1 + each part of systems on the diagonal, `(..., parts, _PART, _PART)`.

    By elimination, one column after the other. Not by torch's solver, which on a GPU may choose its algorithm by how
    many systems there are: the last bits of a row would depend on the other rows.
    """
    parts = CHUNK // _PART
    blocks = system.unflatten(-1, (parts, _PART)).unflatten(-3, (parts, _PART)).transpose(-3, -2)
    diagonal = blocks.diagonal(dim1=-4, dim2=-3).movedim(-1, -3)
    inverses = torch.eye(_PART, dtype=system.dtype, device=system.device).expand_as(diagonal)
    for j in range(_PART - 1):
        inverses = inverses - diagonal[..., j : j + 1] * inverses[..., j : j + 1, :]
    return inverses


def solved(system: Tensor, sides: Tensor) -> Tensor:
    """Return X of (1 + system) X = sides, `(..., CHUNK, n)`: part after part, from those before it."""
    inverses, found = _inverses_of_parts(system), sides[..., :0, :]
    for number in range(CHUNK // _PART):
        rows = slice(number * _PART, (number + 1) * _PART)
        side = sides[..., rows, :]
        if number:
            side = side - system[..., rows, : number * _PART] @ found
        found = torch.cat((found, inverses[..., number, :, :] @ side), dim=-2)
    return found


def inverse(system: Tensor) -> Tensor:
    """Return the inverse of 1 + system, `(..., CHUNK, CHUNK)`, which is strictly lower triangular.

    With P made of the inverses of parts on the diagonal, and N = P @ (what is left of the system), N^4 is zero, and the
    whole inverse is (1 - N) (1 + N^2) P.
    """
    parts = CHUNK // _PART
    part = torch.arange(CHUNK, device=system.device) // _PART
    same = part[::_PART].unsqueeze(1) == part[::_PART]
    whole = torch.where(same.view(parts, parts, 1, 1), _inverses_of_parts(system).unsqueeze(-3), 0).transpose(-3, -2)
    whole = whole.flatten(-2).flatten(-3, -2)
    left = torch.where(part.unsqueeze(1) == part, 0, system)
    n = whole @ left
    whole = whole + n @ (n @ whole)
    return whole - n @ whole


def read_chunks(call: PrefillArguments, decays_of: type[Decays]) -> None:
    """Write the outputs and the last states of a call."""
    compute = torch.promote_types(call.q.dtype, torch.float32)
    v_heads, v_dim, k_dim, n = call.v.shape[-2], call.v.shape[-1], call.q.shape[-1], row_count(call.v, call.cu_seqlens)
    if n == 0:
        return
    layout = chunk_layout(call.v, CHUNK, 1, call.cu_seqlens, None)
    empty = layout.of_row == 0
    ends = row_ends(call.slots, call.write_slots, call.null_slot, empty, call.ssm_state)
    last = call.v.new_zeros(n, v_heads, v_dim, k_dim, dtype=compute)
    if call.ssm_state is not None and call.has_initial_state is not None:
        last = initial_states(call.ssm_state, ends, call.has_initial_state, compute)
    if call.v.numel() == 0:
        if call.ssm_state is not None:
            store_rows(call.ssm_state, ends.target, last, ends.stored)
        return

    inside = layout.inside & ends.is_active[layout.row].unsqueeze(1)

    def gather(tokens: Tensor) -> Tensor:
        """An activation as (pieces, heads, CHUNK, ...), zero where there is no token; heads of q and k as of v."""
        return layout.gather(tokens, inside, compute).transpose(1, 2)

    queries, keys, values, strength = gather(call.q), gather(call.k), gather(call.v), gather(call.beta).unsqueeze(3)
    if call.qk_l2norm:
        queries, keys = normalised(queries), normalised(keys)
    queries = queries * (k_dim**-0.5 if call.scale is None else call.scale)
    per_key = v_heads // call.q.shape[-2]
    decays = decays_of(gather(call.g), per_key)
    products, weights = decays.products(queries, keys)
    queries, keys = (x.repeat_interleave(per_key, 1) for x in (queries, keys))
    sides = torch.cat([strength * values, strength * decays.since * keys], dim=3)
    # What a chunk writes if the state before it is zero, and what to subtract for each state before it.
    alone, through = solved(strength * products, sides).split([v_dim, k_dim], dim=3)
    opened, closing, decay = decays.since * queries, decays.left * keys, decays.since[:, :, -1:]

    if isinstance(layout.longest, int):
        first, outputs = layout.end - layout.of_row, []
        y = torch.zeros_like(values) if layout.packed else values
        for number in range(layout.longest):
            # Rows of one length lie at one distance from each other, and none ends before another.
            piece: Any = slice(number, None, layout.longest)
            if layout.packed:
                exists = number < layout.of_row
                piece = torch.where(exists, first + number, 0)
            new = alone[piece] - through[piece] @ last.mT
            read = opened[piece] @ last.mT + weights[piece] @ new
            after = decay[piece] * last + new.mT @ closing[piece]
            if layout.packed:
                store_rows(y, piece, read, exists)
                last = torch.where(exists.view(n, 1, 1, 1), after, last)
            else:
                outputs.append(read)
                last = after
        if outputs:
            y = torch.stack(outputs, 1).flatten(0, 1)
    else:  # in a program for any length: a chunk multiplies the state by a matrix, and the product of all takes turns
        steps = decay * torch.eye(k_dim, dtype=compute, device=decay.device) - through.mT @ closing
        begins = (layout.number == 0).view(-1, 1, 1, 1)
        initial = torch.where(begins, last[layout.row], 0)
        states = alone.mT @ closing + initial @ steps
        states = carried(states, steps, layout.number, layout.longest, torch.matmul)
        begun = initial + before(states, begins)
        y = opened @ begun.mT + weights @ (alone - through @ begun.mT)
        last = torch.where(empty.view(n, 1, 1, 1), last, states[(layout.end - 1).clamp(min=0)])

    layout.store(call.output, y.transpose(1, 2))
    if call.ssm_state is not None:
        store_rows(call.ssm_state, ends.target, last, ends.stored)
