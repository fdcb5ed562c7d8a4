"""The plan of one engine step: which tokens belong to which request, as tensors of fixed sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import index
from typing import Any

import torch

from mamba_ops.ops._common.checking import device_or_none, whole_number
from mamba_ops.ops._common.sequences import NULL_SLOT, PlanTensors
from mamba_ops.registry.errors import in_call_of
from mamba_ops.serving.pieces import Piece, Row, check_shared, is_number, kept_of, rounds_of, sources_of, whole


@dataclass(frozen=True, eq=False)
class Plan:
    """A batch of decodes and prefills, for the mixing ops and the layers of `mamba_ops.layers`.

    All tensors have the size of the largest batch, and the counts are in a host tensor that only the ops read. So one
    compiled graph serves 0, 1 or many decodes and prefills, and nothing waits for the device.

    Attributes:
        tensors: the plan as the mixing ops take it: `plan.tensors.bind(mamba2_mixing)(projected, ...)`.
        tokens: how many tokens the step has.
        pieces: which tokens of which request the batch has, one piece after the other: decodes first, then prefills. A
            prompt is cut where a state of it is kept, and has its second piece after the first ones of all others.
        null_slot: the slot of padding rows, beside the negative ones.
    """

    tensors: PlanTensors
    tokens: int
    pieces: tuple[Piece, ...] = ()
    null_slot: int = NULL_SLOT

    @property
    def order(self) -> tuple[int, ...]:
        """The requests of the pieces, by their indices in the lists given."""
        return tuple(piece.request for piece in self.pieces)

    @property
    def last_tokens(self) -> dict[int, int]:
        """By request, where in the batch its last token is."""
        ends = accumulate(piece.stop - piece.start for piece in self.pieces)
        return {piece.request: end - 1 for piece, end in zip(self.pieces, ends, strict=True)}

    @classmethod
    def of(
        cls,
        num_computed_tokens: Sequence[int],
        new_tokens: Sequence[int],
        slots: Sequence[int] | Sequence[Sequence[int]],
        *,
        accepted: Sequence[int | None] | None = None,
        prompt_tokens: Sequence[int] | None = None,
        sources: Sequence[int | None] | None = None,
        keep: Sequence[Mapping[int, int] | None] | None = None,
        rounds: int = 1,
        max_requests: int = 256,
        null_slot: int = NULL_SLOT,
        device: torch.device | str = "cpu",
    ) -> "Plan":
        """Plan a step from lists with one entry per request.

        A request decodes if it has computed tokens and one new one, and neither a source nor a state to keep; else it
        is a prefill, whole or one chunk of it.

        Args:
            num_computed_tokens: how many of its tokens came before this step.
            new_tokens: how many it has in this step, 1 at least.
            slots: its slot in the caches, which no other request has; with `accepted`, as many slots as a speculative
                decode has tokens at most. A negative slot, or `null_slot`, is for padding.
            accepted: speculative decoding: how many of the tokens of the request's latest decode were kept. 1 in the
                first decode after a prompt, however long that was; 0 or None while the prompt is read, and None where
                its chunk is no longer than a decode may be. None for all: no speculative decoding.
            prompt_tokens: how long its prompt is. Then a rollback past that is refused: only a decode's tokens can be
                rejected.
            sources: the slot whose state it goes on from in this step, which is only read; its state goes to its own
                slot. None: from its own. Several requests may have one source, such as a prefix that they share.
            keep: by number of tokens, counted from its first one, the slot for the state after these: `{16: 5, 32: 7}`.
                Each is at most its last token in this step, and after those computed before. Its prompt is read in as
                many pieces, in turn, in one step.
            rounds: the most pieces of a prompt in any step, the same for all steps of an engine; one more than states
                kept. `sources` or `keep` in one step: give both in all, if only as None for each request.
            max_requests: the most requests that any step may have, the same for all steps of an engine. A piece of a
                prompt counts as one.
            null_slot: the slot of padding rows, where an engine reserves one.
            device: where the caches are.

        Raises:
            ValueError: lists of different lengths, too many requests, a request without tokens, 2^31 tokens or more, a
                slot used twice, an entry that is no whole number, a number of accepted tokens that the request cannot
                have, a source that another request writes to, a state kept where another one is or of a token that is
                not read.
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
        table = [_whole_numbers("slots", [s] if is_number(s) else s) for s in slots]
        columns = len(table[0]) if table else 1
        _check_requests(num_computed_tokens, new_tokens, table, columns, null_slot)
        counts = [0] * len(requests)
        if accepted is not None:
            counts = _whole_numbers("accepted", [0 if a is None else a for a in accepted])
            is_given = [a is not None for a in accepted]
            _check_accepted(counts, is_given, num_computed_tokens, new_tokens, columns)
        _check_prompts(counts, num_computed_tokens, prompt_tokens)
        (rounds,) = _whole_numbers("rounds", [rounds])
        _check_rounds(rounds, max_requests)
        from_slots, kept_states = sources_of(sources, len(requests)), kept_of(keep, len(requests))
        check_shared(num_computed_tokens, new_tokens, table, from_slots, kept_states, counts, null_slot)

        def decodes(i: int) -> bool:
            is_one = num_computed_tokens[i] > 0 and (new_tokens[i] == 1 or counts[i] > 0)
            return is_one and from_slots[i] in (None, table[i][0]) and not kept_states[i]

        kept = [max(1, count) for count in counts]
        first = [i for i in requests if decodes(i)]
        for i in first:
            if max(new_tokens[i], kept[i]) > columns:
                got = f"{new_tokens[i]} new tokens and {kept[i]} accepted ones for request {i}"
                raise _wrong("slots", got, f"no more than its {columns} slots", "every token's state needs a slot")
            begun, own = table[i][kept[i] - 1], table[i][0]
            if (begun < 0 or begun == null_slot) != (own < 0 or own == null_slot):
                got = f"{begun} for the accepted token of request {i} and {own} for its first one"
                raise _wrong("slots", got, "a slot for both, or padding for both", "it goes on from the first of these")
        others = [i for i in requests if not decodes(i)]
        parts = rounds_of(others, num_computed_tokens, new_tokens, table, from_slots, kept_states)
        if len(parts) > rounds:
            most = max(others, key=lambda i: len(kept_states[i]))
            got = f"{len(kept_states[most])} states of request {most} in {len(parts)} pieces"
            raise _wrong("keep", got, f"at most rounds={rounds} pieces", "read it in several steps, or allow more")
        whole_ones = [
            Row(Piece(i, num_computed_tokens[i], num_computed_tokens[i] + new_tokens[i]), table[i], table[i][0])
            for i in first
        ]
        rows = [*whole_ones, *(row for part in parts for row in part)]
        if len(rows) > max_requests:
            got = f"{len(rows)} pieces of {len(requests)} requests"
            raise _wrong("keep", got, f"at most max_requests={max_requests}", "each of them is a row of the plan")
        tensors = _on_device(
            rows,
            [len(first), *(len(part) for part in parts)],
            rounds,
            None if accepted is None else [kept[row.piece.request] for row in rows],
            sources is not None or keep is not None,
            columns,
            max_requests,
            device,
        )
        pieces = tuple(row.piece for row in rows if row.piece.start < row.piece.stop)
        return cls(tensors, sum(new_tokens), pieces, null_slot)

    @classmethod
    def zeros(
        cls,
        tokens: int,
        *,
        columns: int = 1,
        speculative: bool = False,
        shared: bool = False,
        rounds: int = 1,
        max_requests: int = 256,
        null_slot: int = NULL_SLOT,
        device: torch.device | str = "cpu",
    ) -> "Plan":
        """Plan a profile run: `tokens` padding tokens, so outputs are zero and caches stay as they are.

        Its tensors, and so its graph, are those of the plans that `of` makes with the same `max_requests` and `rounds`,
        `columns` slots for each request, `accepted` if `speculative`, and `sources` or `keep` if `shared`.

        Raises:
            ValueError: a number is none, or there is no such device.
        """
        try:
            whole_number("tokens", tokens, least=0)
            whole_number("columns", columns)
            whole_number("max_requests", max_requests, least=0)
            whole_number("rounds", rounds)
            (null_slot,) = _whole_numbers("null_slot", [null_slot])
            device_or_none("device", device)
        except ValueError as error:
            raise in_call_of("Plan", error) from None
        _check_rounds(rounds, max_requests)
        tensors = _on_device([], [0], rounds, [] if speculative else None, shared, columns, max_requests, device)
        return cls(tensors, tokens, null_slot=null_slot)

    def __str__(self) -> str:
        decodes, _, *rounds = [0, 0] if self.tensors.counts is None else self.tensors.counts.tolist()
        pieces = f" in {sum(rounds[::2])} pieces" if any(rounds[2:]) else ""
        return f"plan of {decodes} decodes and {rounds[0]} prefills{pieces}, {self.tokens} tokens"


def _check_requests(
    num_computed_tokens: Sequence[int], new_tokens: Sequence[int], table: list[list[int]], columns: int, null_slot: int
) -> None:
    """Raise the ValueError about the first request with a wrong number, or with the slot of an earlier request."""
    taken: dict[int, int] = {}
    if (total := sum(new_tokens)) >= 2**31:
        raise _wrong("new_tokens", f"{total} in all", "fewer than 2^31", "read prompts in chunks")
    for i, slots in enumerate(table):
        if new_tokens[i] < 1:
            raise _wrong("new_tokens", f"{new_tokens[i]} for request {i}", "at least 1", "leave the request out")
        if num_computed_tokens[i] < 0:
            raise _wrong("num_computed_tokens", f"{num_computed_tokens[i]} for request {i}", "0 or more")
        if num_computed_tokens[i] + new_tokens[i] >= 2**31:
            got = f"{num_computed_tokens[i]} and {new_tokens[i]} new ones for request {i}"
            raise _wrong("num_computed_tokens", got, "fewer than 2^31 together")
        if not slots:
            raise _wrong("slots", f"none for request {i}", "1 at least")
        if len(slots) != columns:
            raise _wrong("slots", f"{len(slots)} for request {i}", f"{columns}, as for the others")
        for slot in slots:
            if slot < 0 or slot == null_slot:
                continue
            if (other := taken.setdefault(slot, i)) != i:
                hint = "a slot has the state of one request"
                raise _wrong("slots", f"slot {slot} for requests {other} and {i}", "different slots", hint)
            if slots.count(slot) > 1:
                hint = "a slot has the state after one token"
                raise _wrong("slots", f"slot {slot} twice for request {i}", "different slots", hint)


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


def _check_rounds(rounds: int, max_requests: int) -> None:
    """Raise the ValueError about a number of rounds that no plan has."""
    if not 1 <= rounds <= max(1, max_requests):
        expected = f"1 to max_requests={max_requests}"
        raise _wrong("rounds", str(rounds), expected, "each piece of a prompt is a row")


def _check_prompts(accepted: list[int], computed: list[int], prompt_tokens: Sequence[int] | None) -> None:
    """Raise the ValueError about the first request that rejects tokens of its prompt."""
    if prompt_tokens is None:
        return
    lengths = _whole_numbers("prompt_tokens", prompt_tokens)
    if len(lengths) != len(computed):
        raise _wrong("prompt_tokens", f"{len(lengths)} entries", f"{len(computed)}, one per request, as new_tokens has")
    if min(lengths, default=0) < 0:
        raise _wrong("prompt_tokens", str(min(lengths)), "0 or more")
    for i, (count, length) in enumerate(zip(accepted, lengths, strict=True)):
        if count and not length <= computed[i] - (count if count > 1 else 0):
            got = f"{count} for request {i}, of which {computed[i]} tokens came before, {length} of them its prompt"
            hint = "only a decode's tokens can be rejected; read the prompt again from a state that was kept"
            raise _wrong("accepted", got, "no rollback past the prompt", hint)


def _whole_numbers(name: str, values: Any) -> list[int]:
    """Return the numbers as ints, those of numpy and of tensors too; raise ValueError about one that is none."""
    try:
        numbers = [index(value) for value in values]
    except TypeError:
        raise _wrong(name, repr(values), "whole numbers") from None
    return [whole(name, number) for number in numbers]


def _entries(name: str, values: Any) -> list[Any]:
    """Return the entries of a list, or of what is like one; raise ValueError about what is not."""
    try:
        return list(values)
    except TypeError:
        raise _wrong(name, repr(values), "a list with an entry for each request") from None


def _on_device(
    rows: Sequence[Row],
    sizes: Sequence[int],
    rounds: int,
    accepted: list[int] | None,
    shared: bool,
    columns: int,
    most: int,
    device: torch.device | str,
) -> PlanTensors:
    """Pad a plan's rows to their largest sizes and copy them to the device, in one copy that is not waited for.

    `sizes` are the numbers of decodes, and of the prefills of each round.
    """
    idle = most - len(rows)
    lengths, computed = [row.piece.stop - row.piece.start for row in rows], [row.piece.start for row in rows]

    def ends(lengths: list[int]) -> list[int]:
        found = list(accumulate(lengths, initial=0))
        return found + found[-1:] * (most + 1 - len(found))

    parts = [
        ends(lengths),
        ends(lengths[sizes[0] :]),
        [slot for row in rows for slot in row.slots] + [NULL_SLOT] * (idle * columns),
        computed + [0] * idle,
        [] if accepted is None else accepted + [1] * idle,
        [row.target for row in rows] + [NULL_SLOT] * idle if shared else [],
    ]
    pinned = torch.device(device).type != "cpu" and torch.accelerator.is_available()
    flat = torch.tensor([n for part in parts for n in part], dtype=torch.int32, pin_memory=pinned)
    flat = flat.to(device, non_blocking=True)
    cu_seqlens, prefill_cu_seqlens, table, before, kept, targets = flat.split([len(part) for part in parts])
    counts, first = [0] * (2 + 2 * rounds), 0
    for number, size in enumerate(sizes):
        counts[2 * number : 2 * number + 2] = size, sum(lengths[first : first + size])
        first += size
    return PlanTensors(
        torch.tensor(counts),
        cu_seqlens,
        prefill_cu_seqlens,
        table.view(most, columns),
        before > 0,
        before,
        None if accepted is None else kept,
        targets if shared else None,
    )


def _wrong(name: str, got: str, expected: str, hint: str = "") -> ValueError:
    return ValueError(f"Plan: {name}: got {got}, expected {expected}" + (f"; {hint}" if hint else ""))
