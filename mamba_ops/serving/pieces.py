"""How a plan cuts prompts where their states are kept: for prefixes that several requests share."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Tokens that follow each other in a request, and in a batch.

    Attributes:
        request: by the lists that the plan was made of.
        start, stop: tokens `start` up to, and without, `stop` of the request, counted from its first one.
    """

    request: int
    start: int
    stop: int


class Row(NamedTuple):
    """A row of a plan: a piece, the slots that its state comes from, and the one that its last state goes to."""

    piece: Piece
    slots: list[int]
    target: int


def rounds_of(
    requests: Sequence[int],
    computed: Sequence[int],
    new_tokens: Sequence[int],
    table: Sequence[list[int]],
    sources: Sequence[int | None],
    keep: Sequence[Mapping[int, int]],
) -> list[list[Row]]:
    """Cut each prefill after the tokens whose states are kept; a round has one piece of each, in order.

    A piece begins with what the one before it has left. Where a prefill ends with a state that is kept, a row without
    tokens copies it to the request's own slot.
    """
    rounds: list[list[Row]] = []
    for i in requests:
        place, end, own, given = computed[i], computed[i] + new_tokens[i], table[i][0], sources[i]
        source = own if given is None else given
        stops: list[tuple[int, int]] = [*sorted(keep[i].items()), (end, own)]
        for number, (stop, target) in enumerate(stops):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(Row(Piece(i, place, stop), [source, *table[i][1:]], target))
            place, source = stop, target
    return rounds


def check_shared(
    computed: Sequence[int],
    new_tokens: Sequence[int],
    table: Sequence[list[int]],
    sources: Sequence[int | None],
    keep: Sequence[Mapping[int, int]],
    accepted: Sequence[int],
    null_slot: int,
) -> None:
    """Raise the ValueError about the first request that cannot go on from a source, or keep a state where it says."""
    own = {slot: i for i, slots in enumerate(table) for slot in slots if slot >= 0 and slot != null_slot}
    read = {source: i for i, source in enumerate(sources) if source is not None and source not in table[i]}
    kept: dict[int, int] = {}
    for i, (source, states) in enumerate(zip(sources, keep, strict=True)):
        for name, value in (("sources", source), ("keep", states or None)):
            if value is None:
                continue
            if (slot := table[i][0]) < 0 or slot == null_slot:
                raise _wrong(name, f"{value} for request {i} without a slot", "none for padding")
            if accepted[i] > 0:
                hint = "its states lie in its own slots; copy one with StatePool.copy"
                raise _wrong(name, f"{value} for request {i}, a speculative decode", "none for it", hint)
        if source is not None:
            if source < 0 or source == null_slot:
                raise _wrong("sources", f"{source} for request {i}", "a slot with a state")
            if computed[i] == 0:
                raise _wrong("sources", f"slot {source} for request {i} without computed tokens", "none for it")
            if own.get(source, i) != i:
                got, hint = f"slot {source} for request {i}", "copy it with StatePool.copy before the step"
                raise _wrong("sources", got, f"no slot of request {own[source]}, which writes there", hint)
        for stop, target in states.items():
            if not computed[i] < stop <= computed[i] + new_tokens[i]:
                got, last = f"token {stop} of request {i}", computed[i] + new_tokens[i]
                raise _wrong("keep", got, f"{computed[i] + 1} to {last}, as it reads these")
            if target < 0 or target == null_slot:
                raise _wrong("keep", f"slot {target} for request {i}", "a slot of the caches")
            for slots, what in ((kept, "is kept"), (own, "has its own state"), (read, "goes on from a state")):
                if target in slots:
                    got = f"slot {target} for token {stop} of request {i}"
                    expected = f"another one than where request {slots[target]} {what}"
                    raise _wrong("keep", got, expected, "a slot has one state")
            kept[target] = i


def sources_of(given: Any, requests: int) -> list[int | None]:
    """Return the slots that requests go on from; raise ValueError about entries that are none."""
    entries = entries_of("sources", given, requests)
    return [None if entry is None else whole("sources", entry) for entry in entries]


def kept_of(given: Any, requests: int) -> list[dict[int, int]]:
    """Return which states requests keep, by token; raise ValueError about entries that are none."""
    found: list[dict[int, int]] = []
    for i, entry in enumerate(entries_of("keep", given, requests)):
        if entry is not None and not isinstance(entry, Mapping):
            raise _wrong("keep", f"{entry!r} for request {i}", "numbers of tokens, each with a slot, or None")
        found.append({whole("keep", k): whole("keep", v) for k, v in (entry or {}).items()})
    return found


def entries_of(name: str, given: Any, requests: int) -> list[Any]:
    """Return the entries of a list with one for each request; None: none of them has one."""
    if given is None:
        return [None] * requests
    try:
        entries = list(given)
    except TypeError:
        raise _wrong(name, repr(given), "a list with an entry for each request") from None
    if len(entries) != requests:
        raise _wrong(name, f"{len(entries)} entries", f"{requests}, one per request, as new_tokens has")
    return entries


def is_number(value: Any) -> bool:
    """Whether a value is one whole number: arrays and tensors have `__index__`, whatever their shape and dtype."""
    try:
        index(value)
    except TypeError:
        return False
    return not getattr(value, "shape", ())


def whole(name: str, value: Any) -> int:
    """Return a number of 32 bits as an int; raise ValueError about what is none."""
    try:
        number = index(value)
    except TypeError:
        raise _wrong(name, repr(value), "whole numbers") from None
    if not -(2**31) <= number < 2**31:
        raise _wrong(name, str(number), "numbers of 32 bits")
    return number


def _wrong(name: str, got: str, expected: str, hint: str = "") -> ValueError:
    return ValueError(f"Plan: {name}: got {got}, expected {expected}" + (f"; {hint}" if hint else ""))
