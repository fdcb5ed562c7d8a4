"""Checks of values that several ops make: slots, lengths and other indices that would lead out of a tensor.

They run in every call on a CPU, and elsewhere within `checking()`, as they read on the host (`Op.validate_values`).
Each raises the ValueError that names the argument, the row and the value. What no row uses is not looked at.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.mixing import Batch, batch_of
from mamba_ops.ops._common.sequences import DecodeArgs, PlanTensors, SequenceArgs
from mamba_ops.ops._common.slots import is_padding, row_ends, update_ends
from mamba_ops.registry import bad_argument


class Rows(NamedTuple):
    """Some rows of a call, and how messages call what is known of them.

    Attributes:
        lengths: (n,), the tokens of each.
        first: the number of the first of them in the caller's tensors.
    """

    lengths: Tensor
    first: int = 0

    @property
    def size(self) -> int:
        """The number of rows."""
        return self.lengths.shape[0]


def check_rows(
    x: Tensor, cu_seqlens: Tensor | None, length: int = 1, *, name: str = "cu_seqlens", first: int = 0
) -> Rows:
    """`cu_seqlens` begins with 0, never decreases, and ends at most at the last of x's tokens; return the rows.

    Without it x has rows of `length` tokens.
    """
    if cu_seqlens is None:
        return Rows(torch.full((x.shape[0],), length, device=x.device), first)
    tokens, lengths = x.shape[0], cu_seqlens.diff()
    if int(cu_seqlens[0]) != 0:
        raise bad_argument(name, got=f"{int(cu_seqlens[0])} as its first entry", expected="0")
    ends, what = cu_seqlens[1:], "for the end of row"
    refuse(name, ends, lengths < 0, "no less than the entry before", first, what=what)
    refuse(name, ends, ends > tokens, f"at most the {tokens} tokens that there are", first, what=what)
    return Rows(lengths, first)


def check_counts(
    name: str,
    counts: Tensor | None,
    low: int,
    high: int | None = None,
    *,
    why: str = "",
    first: int = 0,
    what: str = "in row",
) -> None:
    """`counts`, where they are given, are from `low` to `high`."""
    if counts is not None:
        wrong = counts < low if high is None else (counts < low) | (counts > high)
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        refuse(name, counts, wrong, expected + why, first, what=what)


def check_sequence_slots(
    rows: Rows, cache: Tensor | None, name: str, slots: Tensor | None, write_slots: Tensor | None, null_slot: int
) -> None:
    """The slots in column 0 that rows read, and store to after their last tokens, are slots of the cache `name`."""
    if cache is None or (slots is None and write_slots is None):
        return
    empty = rows.lengths == 0
    ends = row_ends(slots, write_slots, null_slot, empty, None)
    slots_in_cache("slots", ends.source, (ends.is_active & ~empty) | ends.stored, cache, name, rows.first)
    table = "slots" if write_slots is None else "write_slots"
    slots_in_cache(table, ends.target, ends.stored, cache, name, rows.first)


def check_update_slots(
    rows: Rows,
    cache: Tensor,
    name: str,
    slots: Tensor | None,
    write_slots: Tensor | None,
    num_accepted_tokens: Tensor | None,
    null_slot: int,
) -> None:
    """The slots that rows of a few tokens start from, and store to, are slots of the cache `name`.

    And num_accepted_tokens are no more than there are columns to start from.
    """
    if slots is None and write_slots is None:
        return
    _check_accepted(slots, num_accepted_tokens, rows.first)
    longest = int(rows.lengths.max()) if rows.size else 0
    inside = torch.arange(longest, device=rows.lengths.device) < rows.lengths.unsqueeze(1)
    if not inside.numel():
        return
    ends = update_ends(slots, write_slots, null_slot, num_accepted_tokens, inside, None)
    slots_in_cache("slots", ends.source, ends.is_active, cache, name, rows.first)
    table = "slots" if write_slots is None else "write_slots"
    slots_in_cache(table, ends.target, ends.stored, cache, name, rows.first)


def _check_accepted(slots: Tensor | None, num_accepted_tokens: Tensor | None, first: int = 0) -> None:
    """No more tokens were accepted than there are columns to start from."""
    if num_accepted_tokens is not None and slots is not None:
        columns = slots.shape[1] if slots.dim() == 2 else 1
        why = f", as slots has {columns} columns"
        check_counts("num_accepted_tokens", num_accepted_tokens, 0, columns, why=why, first=first)


def check_sequences(call: Any, x: Tensor, name: str) -> None:
    """What an op over sequences is told of its rows fits its tokens and its cache, the argument `name`."""
    rows = check_rows(x, call.cu_seqlens, 1 if call.cu_seqlens is not None or x.dim() == 2 else x.shape[1])
    write_slots = getattr(call, "write_slots", None)
    check_sequence_slots(rows, getattr(call, name), name, call.slots, write_slots, call.null_slot)


def check_updates(call: Any, x: Tensor) -> None:
    """What an op that advances `ssm_state` is told of its rows fits its tokens and the cache."""
    packed = call.cu_seqlens is not None or x.dim() < call.ssm_state.dim()
    rows = check_rows(x, call.cu_seqlens, 1 if packed else x.shape[1])
    tables = (call.slots, call.write_slots, call.num_accepted_tokens)
    check_update_slots(rows, call.ssm_state, "ssm_state", *tables, call.null_slot)


def check_mixing(
    op: str,
    call: Any,
    projected: Tensor,
    *,
    windows: Sequence[str] = ("conv_state",),
    states: Sequence[str] = ("ssm_state",),
) -> None:
    """What the plan of a mixing op's call says of its rows fits the caches of those names, so that all ops take it."""
    plan, batch = PlanTensors.of(call), batch_of(op, call, projected.shape[0])
    if plan.counts is None or plan.cu_seqlens is None:
        return
    counts = plan.counts.tolist()
    decoding, reading = counts[0], sum(counts[2::2])
    check_rows(projected[: batch.tokens], plan.cu_seqlens[: decoding + reading + 1])
    _check_ends(batch, plan.cu_seqlens, decoding, reading)
    if (decodes := batch.decodes) is not None:
        args = decodes.arguments
        assert isinstance(args, DecodeArgs)  # for mypy: those of decodes are
        rows = check_rows(decodes.of(projected), args.cu_seqlens)
        tables = (args.slots, None, args.num_accepted_tokens)
        if windows and states:
            _check_padding(args)
        if not states:
            _check_accepted(args.slots, args.num_accepted_tokens)
        for name in states:
            check_update_slots(rows, getattr(call, name), name, *tables, args.null_slot)
        for name in windows:
            check_sequence_slots(rows, getattr(call, name), name, args.slots, None, args.null_slot)
    first = decoding
    for prefills in batch.prefills:
        args = prefills.arguments
        assert isinstance(args, SequenceArgs)  # for mypy: those of prefills are
        rows = check_rows(prefills.of(projected), args.cu_seqlens, name="prefill_cu_seqlens", first=first)
        for name in windows or states[:1]:  # all caches have as many slots
            check_sequence_slots(rows, getattr(call, name), name, args.slots, args.write_slots, args.null_slot)
        check_counts("num_computed_tokens", prefills.num_computed_tokens, 0, first=first)
        first += rows.size


def _check_padding(args: DecodeArgs) -> None:
    """A speculative decode is padding for all caches or for none: windows read column 0, states a later one."""
    if args.slots is None or args.slots.dim() == 1 or args.num_accepted_tokens is None:
        return
    first = (args.num_accepted_tokens.long() - 1).clamp(0, args.slots.shape[1] - 1)
    start = args.slots.gather(1, first.unsqueeze(1)).squeeze(1)
    wrong = is_padding(start, args.null_slot) != is_padding(args.slots[:, 0], args.null_slot)
    expected = "a slot there and in column 0, or padding in both"
    refuse("slots", start, wrong, expected, what="for the accepted token of row")


def _check_ends(batch: Batch, cu_seqlens: Tensor, decoding: int, reading: int) -> None:
    """A plan's two tensors of ends say the same as its counts; a decode that is padding may have no token."""
    ends = cu_seqlens[: decoding + reading + 1]
    if batch.decodes is not None and batch.decodes.arguments.cu_seqlens is None:
        args = batch.decodes.arguments
        assert args.slots is not None  # for mypy; a plan has them
        differs = ends[: decoding + 1] != torch.arange(decoding + 1, device=ends.device)
        wrong = (differs[:-1] | differs[1:]) & ~is_padding(args.slots, args.null_slot)
        expected = "one more than for the row before: a decode has one token"
        refuse("cu_seqlens", ends[1:], wrong, expected, what="for the end of row")
    row, hint = decoding, "the counts and cu_seqlens are of two batches"
    for prefills in batch.prefills:
        assert prefills.arguments.cu_seqlens is not None  # for mypy; a plan has them
        own, first = prefills.arguments.cu_seqlens, row
        row += own.shape[0] - 1
        for place, count in ((first, prefills.tokens.start), (row, prefills.tokens.stop)):
            if int(ends[place]) != count:
                got, expected = f"{int(ends[place])} as the start of row {place}", f"{count}, as counts says"
                raise bad_argument("cu_seqlens", got=got, expected=expected, hint=hint)
        wrong = own != ends[first : row + 1] - ends[first]
        expected = "what cu_seqlens has there, less the tokens before this round's"
        refuse("prefill_cu_seqlens", own, wrong, expected, first - decoding, what="at entry")


def slots_in_cache(
    name: str, slots: Tensor, used: Tensor, cache: Tensor, cache_name: str, first: int = 0, *, what: str = "in row"
) -> None:
    """Those of `slots` that are `used` are slots of the cache, the argument `cache_name`; none of them is negative."""
    expected = f"less than {cache.shape[0]}, the number of slots of {cache_name}"
    hint = "a negative slot, or null_slot, is for padding rows"
    refuse(name, slots, used & (slots >= cache.shape[0]), expected, first, what=what, hint=hint)


def refuse(
    name: str, values: Tensor, wrong: Tensor, expected: str, first: int = 0, *, what: str = "in row", hint: str = ""
) -> None:
    """Raise about the first value that is wrong, if one is."""
    if wrong.any():
        index = wrong.nonzero()[0]
        row, *columns = index.tolist()
        place = f"{what} {first + row}" + "".join(f", column {column}" for column in columns)
        raise bad_argument(name, got=f"{int(values[tuple(index)])} {place}", expected=expected, hint=hint)
