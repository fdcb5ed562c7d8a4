"""How the references of the cached ops read slot tables and store rows, without reading any value on the host.

Values that are out of range do no harm: a slot that the cache does not have counts as the null slot, and the bounds of
rows are kept within the tokens. On a CPU such a call is refused before it comes here (values.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import bad_argument
from mamba_ops.registry.decomposition import is_decomposing


def is_padding(slots: Tensor, null_slot: int, slot_count: int | None = None) -> Tensor:
    """Whether each slot is that of a padding row: negative, null, or beyond a cache of `slot_count` slots."""
    padding = (slots < 0) | (slots == null_slot)
    return padding if slot_count is None else padding | (slots >= slot_count)


def row_bounds(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Where rows start and end among `tokens` packed tokens, both int64 (n,): never outside, never decreasing."""
    bounds = never_decreasing(cu_seqlens, 0, tokens)
    return bounds[:-1], bounds[1:]


def never_decreasing(values: Tensor, least: int, most: int) -> Tensor:
    """Whole numbers (n,) that are between two limits and do not decrease, as they are; others made so. int64.

    Not by cummax, which exported programs do not have everywhere: ONNX has none.
    """
    values = values.long().clamp(least, most)
    rises = torch.cat((values[:1], values.diff().clamp(min=0)))
    return rises.cumsum(0).clamp(max=most)


def row_at(ends: Tensor, count: int) -> Tensor:
    """The row of each of `count` places, int64 (count,), given where each row ends among them, and n after the last.

    `torch.bucketize(torch.arange(count), ends, right=True)`, which torch.onnx can decompose for one number of rows
    alone. `ends`: int64 (n,), never decreasing.
    """
    ended = ends.new_zeros(count + 1).scatter_add_(0, ends.clamp(0, count), torch.ones_like(ends))
    return ended.cumsum(0)[:count]


def slot_columns(table: Tensor, rows: int) -> Tensor:
    """The first `rows` rows of a 1-D or 2-D slot table, as int64 `(rows, columns)`."""
    return (table if table.dim() == 2 else table.unsqueeze(1))[:rows].long()


def row_slots(
    table: Tensor | None, rows: int, null_slot: int, device: torch.device, slot_count: int | None = None
) -> tuple[Tensor, Tensor]:
    """The slots of all rows, `(rows, columns)`, and which of them are no padding: without a table row i has slot i.

    `slot_count` is the number of slots that the cache has; None: all are taken to be there.
    """
    if table is None:
        return torch.arange(rows, device=device).unsqueeze(1), torch.ones(rows, 1, dtype=torch.bool, device=device)
    slots = slot_columns(table, rows)
    return slots, ~is_padding(slots, null_slot, slot_count)


def _slot_count(cache: Tensor | None) -> int | None:
    return None if cache is None else cache.shape[0]


class Ends(NamedTuple):
    """Which slots n rows read and write; all (n,)."""

    source: Tensor  # the slot of the initial state
    is_active: Tensor  # whether the row is no padding
    target: Tensor  # the slot of the last state
    stored: Tensor  # whether that is stored


def row_ends(
    slots: Tensor | None, write_slots: Tensor | None, null_slot: int, empty: Tensor, cache: Tensor | None
) -> Ends:
    """Read both tables. A row without tokens (`empty`) stores its initial state, if its two slots differ.

    Without `cache` all slots are taken to be there.
    """
    n, device, slot_count = empty.shape[0], empty.device, _slot_count(cache)
    source, is_active = (t[:, 0] for t in row_slots(slots, n, null_slot, device, slot_count))
    target, stored = source, is_active & ~empty
    if write_slots is not None:
        target, written = (t[:, 0] for t in row_slots(write_slots, n, null_slot, device, slot_count))
        stored = is_active & written & ~(empty & (target == source))
    return Ends(source, is_active, target, stored)


class UpdateEnds(NamedTuple):
    """Which slots n rows read and write: after each of their first `kept` tokens, or once, after the last one."""

    source: Tensor  # (n,): the slot of the initial state
    is_active: Tensor  # (n,): whether the row is no padding, and has tokens
    target: Tensor  # (n, kept): the slots of these states
    stored: Tensor  # (n, kept): whether each is stored


def update_ends(
    slots: Tensor | None,
    write_slots: Tensor | None,
    null_slot: int,
    num_accepted_tokens: Tensor | None,
    inside: Tensor,
    cache: Tensor | None,
) -> UpdateEnds:
    """Read both tables for rows whose tokens are `inside`, (n, length).

    Without `cache` all slots are taken to be there. With num_accepted_tokens a row keeps the state after every token,
    as far as there are columns; otherwise it keeps the last one, in column 0.
    """
    (n, length), device, slot_count = inside.shape, inside.device, _slot_count(cache)
    target, stored = columns, is_active = row_slots(slots, n, null_slot, device, slot_count)
    if write_slots is not None:
        target, stored = row_slots(write_slots, n, null_slot, device, slot_count)
    first, kept = torch.zeros_like(columns[:, :1]), 1
    if num_accepted_tokens is not None:
        first = (num_accepted_tokens.long().unsqueeze(1) - 1).clamp(0, columns.shape[1] - 1)
        kept = min(length, target.shape[1])
    source = columns.gather(1, first).squeeze(1)
    is_active = is_active.gather(1, first).squeeze(1) & inside[:, 0]
    target, stored = target[:, :kept], stored[:, :kept] & inside[:, :kept] & is_active.unsqueeze(1)
    return UpdateEnds(source, is_active, target, stored)


def initial_states(cache: Tensor, ends: Ends, has_initial_state: Tensor, dtype: torch.dtype) -> Tensor:
    """The initial states of rows: those in `cache`, or zero."""
    carried = ends.is_active & has_initial_state
    states = cache[torch.where(carried, ends.source, 0)]
    return torch.where(carried.view(-1, *[1] * (cache.dim() - 1)), states, 0).to(dtype)


def store_rows(target: Tensor, index: Tensor, values: Tensor, is_active: Tensor) -> None:
    """Set `target[index[i]] = values[i]` for every active i; all other rows of `target` keep their bits.

    An inactive i repeats the store of the first active one, so that stores to one place carry the same bits, whichever
    comes last. With no active one, row 0 of `target` is stored back as it is.
    """
    if index.numel() == 0 or target.numel() == 0:
        return
    values = values.to(target.dtype)
    first = is_active.int().argmax().unsqueeze(0)  # indexing with a tensor of no dimension would read it on the host
    any_active = is_active.index_select(0, first)
    spare_index = torch.where(any_active, index.index_select(0, first), 0)
    spare = torch.where(
        any_active.view([1] * values.dim()), values.index_select(0, first), target.index_select(0, spare_index)
    )
    chosen = is_active.view(-1, *[1] * (values.dim() - 1))
    target[torch.where(is_active, index, spare_index)] = torch.where(chosen, values, spare)


def padded_rows(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For rows padded to the longest: each token's index in the packed tensor, and whether there is such a token.

    Both are `(n, longest)`; padding has index 0. Reads the longest length on the host.
    """
    refuse_lengths_where_decomposing()
    starts, ends = row_bounds(cu_seqlens, tokens)
    lengths = ends - starts
    longest = int(lengths.max()) if lengths.numel() else 0
    offsets = torch.arange(longest, device=cu_seqlens.device)
    inside = offsets < lengths.unsqueeze(1)
    return torch.where(inside, starts.unsqueeze(1) + offsets, 0), inside


def refuse_lengths_where_decomposing() -> None:
    """Raise ValueError about rows of several lengths in an exported program that is decomposed."""
    if is_decomposing():
        expected = "None in an exported program that is decomposed"
        hint = "the longest row would be read on the host; keep the op, or give all rows as many tokens"
        raise bad_argument("cu_seqlens", got="a tensor", expected=expected, hint=hint)


def row_of_tokens(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For every packed token the row that it is in, and whether it is in one. Empty rows have none."""
    row = row_at(cu_seqlens[1:].long(), tokens)
    return row.clamp(max=cu_seqlens.shape[0] - 2), row < cu_seqlens.shape[0] - 1
