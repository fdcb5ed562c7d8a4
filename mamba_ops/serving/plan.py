"""The plan of one engine step: which tokens belong to which request, as tensors of fixed sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import index
from typing import Any

import torch

from mamba_ops.ops._common.checking import device_or_none, whole_number
from mamba_ops.ops._common.sequences import NULL_SLOT, PlanTensors
from mamba_ops.registry.errors import in_call_of


@dataclass(frozen=True, eq=False)
class Plan:
    """A batch of decodes and prefills, for the mixing ops and the layers of `mamba_ops.layers`.

    All tensors have the size of the largest batch, and the counts are in a host tensor that only the ops read. So one
    compiled graph serves 0, 1 or many decodes and prefills, and nothing waits for the device.

    Attributes:
        tensors: the plan as the mixing ops take it: `plan.tensors.bind(mamba2_mixing)(projected, ...)`.
        tokens: how many tokens the step has.
        order: the order of the requests' tokens in the batch, by the requests' indices in the lists given: decodes
            first, then prefills.
        null_slot: the slot of padding rows, beside the negative ones.
    """

    tensors: PlanTensors
    tokens: int
    order: tuple[int, ...] = ()
    null_slot: int = NULL_SLOT

    @classmethod
    def of(
        cls,
        num_computed_tokens: Sequence[int],
        new_tokens: Sequence[int],
        slots: Sequence[int] | Sequence[Sequence[int]],
        *,
        accepted: Sequence[int | None] | None = None,
        max_requests: int = 256,
        null_slot: int = NULL_SLOT,
        device: torch.device | str = "cpu",
    ) -> "Plan":
        """Plan a step from lists with one entry per request.

        A request decodes if it has computed tokens and one new one; else it is a prefill, whole or one chunk of it.

        Args:
            num_computed_tokens: how many of its tokens came before this step.
            new_tokens: how many it has in this step, 1 at least.
            slots: its slot in the caches, which no other request has; with `accepted`, as many slots as a speculative
                decode has tokens at most. A negative slot, or `null_slot`, is for padding.
            accepted: speculative decoding: how many of the tokens of the request's latest decode were kept. 1 in the
                first decode after a prompt, however long that was; 0 or None while the prompt is read, and None where
                its chunk is no longer than a decode may be. None for all: no speculative decoding.
            max_requests: the most requests that any step may have, the same for all steps of an engine.
            null_slot: the slot of padding rows, where an engine reserves one.
            device: where the caches are.

        Raises:
            ValueError: lists of different lengths, too many requests, a request without tokens, a slot used twice, an
                entry that is no whole number, a number of accepted tokens that the request cannot have.
        """
        num_computed_tokens = _whole_numbers("num_computed_tokens", num_computed_tokens)
        new_tokens = _whole_numbers("new_tokens", new_tokens)
        (null_slot,) = _whole_numbers("null_slot", [null_slot])
        (max_requests,) = _whole_numbers("max_requests", [max_requests])
        try:
            device_or_none("device", device)
        except ValueError as error:
            raise in_call_of("Plan", error) from None
        slots = _entries("slots", slots)
        accepted = None if accepted is None else _entries("accepted", accepted)
        requests = range(len(new_tokens))
        for name, values in (("num_computed_tokens", num_computed_tokens), ("slots", slots), ("accepted", accepted)):
            if values is not None and len(values) != len(requests):
                raise _wrong(name, f"{len(values)} entries", f"{len(requests)}, one per request, as new_tokens has")
        if len(requests) > max_requests:
            raise _wrong("new_tokens", f"{len(requests)} requests", f"at most max_requests={max_requests}")
        table = [_whole_numbers("slots", [s] if hasattr(s, "__index__") else s) for s in slots]
        columns = len(table[0]) if table else 1
        _check_requests(num_computed_tokens, new_tokens, table, columns, null_slot)
        counts = [0] * len(requests)
        if accepted is not None:
            counts = _whole_numbers("accepted", [0 if a is None else a for a in accepted])
            is_given = [a is not None for a in accepted]
            _check_accepted(counts, is_given, num_computed_tokens, new_tokens, columns)

        def decodes(i: int) -> bool:
            return num_computed_tokens[i] > 0 and (new_tokens[i] == 1 or counts[i] > 0)

        kept = [max(1, count) for count in counts]
        first = [i for i in requests if decodes(i)]
        for i in first:
            if max(new_tokens[i], kept[i]) > columns:
                got = f"{new_tokens[i]} new tokens and {kept[i]} accepted ones for request {i}"
                raise _wrong("slots", got, f"no more than its {columns} slots", "every token's state needs a slot")
        order = first + [i for i in requests if not decodes(i)]
        lengths = [new_tokens[i] for i in order]
        return cls(
            _on_device(
                lengths,
                len(first),
                [table[i] for i in order],
                [num_computed_tokens[i] for i in order],
                None if accepted is None else [kept[i] for i in order],
                columns,
                max_requests,
                device,
            ),
            sum(lengths),
            tuple(order),
            null_slot,
        )

    @classmethod
    def zeros(
        cls,
        tokens: int,
        *,
        columns: int = 1,
        speculative: bool = False,
        max_requests: int = 256,
        null_slot: int = NULL_SLOT,
        device: torch.device | str = "cpu",
    ) -> "Plan":
        """Plan a profile run: `tokens` padding tokens, so outputs are zero and caches stay as they are.

        Its tensors, and so its graph, are those of the plans that `of` makes with the same `max_requests`, `columns`
        slots for each request, and `accepted` if `speculative`.

        Raises:
            ValueError: a number is none, or there is no such device.
        """
        try:
            whole_number("tokens", tokens, least=0)
            whole_number("columns", columns)
            whole_number("max_requests", max_requests, least=0)
            (null_slot,) = _whole_numbers("null_slot", [null_slot])
            device_or_none("device", device)
        except ValueError as error:
            raise in_call_of("Plan", error) from None
        tensors = _on_device([], 0, [], [], [] if speculative else None, columns, max_requests, device)
        return cls(tensors, tokens, null_slot=null_slot)

    def __str__(self) -> str:
        decodes, _, prefills, _ = [] if self.tensors.counts is None else self.tensors.counts.tolist()
        return f"plan of {decodes} decodes and {prefills} prefills, {self.tokens} tokens"


def _check_requests(
    num_computed_tokens: Sequence[int], new_tokens: Sequence[int], table: list[list[int]], columns: int, null_slot: int
) -> None:
    """Raise the ValueError about the first request with a wrong number, or with the slot of an earlier request."""
    taken: dict[int, int] = {}
    for i, slots in enumerate(table):
        if new_tokens[i] < 1:
            raise _wrong("new_tokens", f"{new_tokens[i]} for request {i}", "at least 1", "leave the request out")
        if num_computed_tokens[i] < 0:
            raise _wrong("num_computed_tokens", f"{num_computed_tokens[i]} for request {i}", "0 or more")
        if len(slots) != columns:
            raise _wrong("slots", f"{len(slots)} for request {i}", f"{columns}, as for the others")
        for slot in slots:
            if slot >= 0 and slot != null_slot and taken.setdefault(slot, i) != i:
                hint = "a slot has the state of one request"
                raise _wrong("slots", f"slot {slot} for requests {taken[slot]} and {i}", "different slots", hint)


def _check_accepted(
    accepted: list[int], is_given: list[bool], computed: list[int], new_tokens: list[int], columns: int
) -> None:
    """Raise the ValueError about the first request whose number of accepted tokens says something else than it means.

    Only a decode leaves a state after each of its tokens; a prompt leaves one, in the first slot.
    """
    for i, count in enumerate(accepted):
        if count < 0:
            raise _wrong("accepted", f"{count} for request {i}", "0 or more")
        if count > 1 and count >= computed[i]:
            got = f"{count} for request {i}, of which {computed[i]} tokens came before"
            raise _wrong("accepted", got, "1 after a prompt", "it leaves one state, however long it was")
        if count == 0 and is_given[i] and computed[i] > 0 and 1 < new_tokens[i] <= columns:
            got = f"0 for request {i} with {new_tokens[i]} new tokens, as a decode may have"
            hint = "1 after a prompt, None while its last tokens are read"
            raise _wrong("accepted", got, "at least 1 or None", hint)


def _whole_numbers(name: str, values: Any) -> list[int]:
    """Return the numbers as ints, those of numpy and of tensors too; raise ValueError about one that is none."""
    try:
        numbers = [index(value) for value in values]
    except TypeError:
        raise _wrong(name, repr(values), "whole numbers") from None
    for number in numbers:
        if not -(2**31) <= number < 2**31:
            raise _wrong(name, str(number), "numbers of 32 bits")
    return numbers


def _entries(name: str, values: Any) -> list[Any]:
    """Return the entries of a list, or of what is like one; raise ValueError about what is not."""
    try:
        return list(values)
    except TypeError:
        raise _wrong(name, repr(values), "a list with an entry for each request") from None


def _on_device(
    lengths: list[int],
    decodes: int,
    slots: list[list[int]],
    computed: list[int],
    accepted: list[int] | None,
    columns: int,
    most: int,
    device: torch.device | str,
) -> PlanTensors:
    """Pad a plan's lists to their largest sizes and copy them to the device, in one copy that is not waited for."""
    rows = len(lengths)

    def ends(lengths: list[int]) -> list[int]:
        found = list(accumulate(lengths, initial=0))
        return found + found[-1:] * (most + 1 - len(found))

    parts = [
        ends(lengths),
        ends(lengths[decodes:]),
        [slot for row in slots for slot in row] + [NULL_SLOT] * ((most - rows) * columns),
        computed + [0] * (most - rows),
        [] if accepted is None else accepted + [1] * (most - rows),
    ]
    pinned = torch.device(device).type != "cpu" and torch.accelerator.is_available()
    flat = torch.tensor([n for part in parts for n in part], dtype=torch.int32, pin_memory=pinned)
    flat = flat.to(device, non_blocking=True)
    cu_seqlens, prefill_cu_seqlens, table, before, kept = flat.split([len(part) for part in parts])
    split = sum(lengths[:decodes])
    return PlanTensors(
        torch.tensor([decodes, split, rows - decodes, sum(lengths) - split]),
        cu_seqlens,
        prefill_cu_seqlens,
        table.view(most, columns),
        before > 0,
        before,
        None if accepted is None else kept,
    )


def _wrong(name: str, got: str, expected: str, hint: str = "") -> ValueError:
    return ValueError(f"Plan: {name}: got {got}, expected {expected}" + (f"; {hint}" if hint else ""))
