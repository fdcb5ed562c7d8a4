"""Values that lead out of a tensor: refused on a CPU before anything is written, padding where nothing is read."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.registry import Op, Sample
from tests.harness import OPS, backends_here, samples_for, with_output
from tests.test_bad_input import assert_untouched

pytestmark = pytest.mark.usefixtures("no_grad")
CPU = torch.device("cpu")
CACHES = ("conv_state", "ssm_state")

Change = Callable[[Tensor, int], Tensor | None]
"""Makes a table wrong, given it and the number of slots; None: it has nothing to make wrong."""


def entry(number: int, value: Callable[[int, Tensor], int]) -> Change:
    def change(table: Tensor, slots: int) -> Tensor | None:
        if number >= table.numel():
            return None
        table.view(-1)[number] = value(slots, table)
        return table

    return change


def swapped(bounds: Tensor, _: int) -> Tensor | None:
    if bounds.numel() < 3 or bounds[1] == bounds[2]:
        return None
    bounds[1], bounds[2] = bounds[2].clone(), bounds[1].clone()
    return bounds


WRONG: dict[str, dict[str, Change]] = {
    "slots": {
        "the number of slots": entry(0, lambda slots, _: slots),
        "far beyond": entry(0, lambda slots, _: slots + 1000),
    },
    "write_slots": {"beyond": lambda table, slots: torch.full_like(table, slots + 1)},  # those of decodes are not read
    "cu_seqlens": {
        "one more at the end": lambda bounds, _: torch.where(bounds == bounds[-1], bounds + 1000, bounds),
        "one less at the start": entry(0, lambda *_: -1),
        "one more at the start": entry(0, lambda *_: 1),
        "falls": swapped,
        "leaps": entry(1, lambda _, bounds: int(bounds[-1]) + 40),
    },
    "prefill_cu_seqlens": {
        "leaps": entry(1, lambda _, bounds: int(bounds[-1]) + 40),
        "starts later": entry(0, lambda *_: 1),
    },
    "num_accepted_tokens": {"many": entry(0, lambda *_: 100), "negative": entry(0, lambda *_: -5)},
    "num_computed_tokens": {"negative": entry(-1, lambda *_: -5)},
    "first_block": {"beyond": entry(0, lambda *_: 9), "negative": entry(0, lambda *_: -1)},
    "last_block": {"beyond": entry(0, lambda *_: 9), "negative": entry(0, lambda *_: -1)},
    "initial_block": {"beyond": entry(0, lambda *_: 9), "negative": entry(0, lambda *_: -1)},
    "chunk_ends": {"beyond": entry(-1, lambda *_: 1000), "falls": entry(0, lambda *_: 30)},
    "last_chunk": {
        "beyond": entry(-1, lambda *_: 9),
        "falls": entry(1, lambda *_: 0),
        "early": entry(-1, lambda *_: 5),
    },
}


def wrong_calls(op: Op[...], sample: Sample) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A sample's arguments with each of its tables wrong in each way."""
    for name, changes in WRONG.items():
        for way, change in changes.items():
            arguments = arguments_of(op, sample)
            cache = next((c for n in CACHES if (c := arguments.get(n)) is not None), None)
            if arguments.get(name) is None or ("slots" in name and cache is None):
                continue
            table = change(arguments[name].clone(), 0 if cache is None else cache.shape[0])
            if table is not None:
                yield name, way, {**arguments, name: table}


def arguments_of(op: Op[...], sample: Sample) -> dict[str, Any]:
    """A copy of a sample's arguments, by the names of the front, with an output to write."""
    mine = with_output(op, sample).clone()
    return {"out" if n == "output" else n: a for n, a in op.bind(mine.args, mine.kwargs).items()}


def refusal(op: Op[...], backend: str, arguments: dict[str, Any]) -> str | None:
    """What a call is refused with, which then leaves everything as it was; None if it is taken."""
    before = Sample("", (), arguments).clone()
    try:
        with mamba_ops.use_backend(backend):
            op(**arguments)
    except ValueError as error:
        assert_untouched(before, Sample("", (), arguments))
        return str(error)
    return None


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_values_are_refused_before_anything_is_written(op: Op[...]) -> None:
    """In every sample that uses them, alike on every backend: named are the op, the argument and the value."""
    seen: set[tuple[str, str]] = set()
    taken = {backend: {s.name for s in samples_for(op, backend, CPU)} for backend in backends_here(op, CPU)}
    assert all(taken.values())
    for sample in op.make_samples("cpu"):
        for name, way, arguments in wrong_calls(op, sample):
            if (said := refusal(op, "torch", arguments)) is not None:
                assert re.match(rf"mamba_ops::{op.name}: {name}: got -?\d+ \w.*, expected ", said), said
                for backend in [backend for backend, names in taken.items() if sample.name in names]:
                    assert refusal(op, backend, arguments) == said
                seen.add((name, way))
    assert seen == {(p.name, way) for p in op.parameters for way in WRONG.get(p.name, ())}


WITH_SLOTS = [op for op in OPS if "slots" in [p.name for p in op.parameters]]


@pytest.mark.parametrize("op", WITH_SLOTS, ids=lambda op: op.name)
def test_one_slot_out_of_range_leaves_all_rows_as_they_were(op: Op[...]) -> None:
    """Whichever entry of a table it is, of whichever sample: an entry that no row reads does no harm."""
    tables = 0
    for good in op.make_samples("cpu"):
        bound = op.bind(good.args, good.kwargs)
        for name in ("slots", "write_slots"):
            if (table := bound.get(name)) is None or not any(bound.get(c) is not None for c in CACHES):
                continue
            refused = 0
            for number in range(table.numel()):
                arguments = {**arguments_of(op, good), name: table.clone()}
                arguments[name].view(-1)[number] = 1000
                if (said := refusal(op, "torch", arguments)) is not None:
                    assert f"{name}: got 1000 " in said
                    refused += 1
            tables += refused > 0
    assert tables >= 5  # a test that looked at no table would pass


MIXING = [op for op in OPS if "counts" in [p.name for p in op.parameters]]


@pytest.mark.parametrize("op", MIXING, ids=lambda op: op.name)
def test_a_decode_begins_where_its_row_is(op: Op[...]) -> None:
    """Also behind padding that has no token: else it would have two, of which one is read."""
    seen = 0
    for sample in op.make_samples("cpu"):
        arguments = arguments_of(op, sample)
        counts = arguments["counts"]
        if counts is None or counts[0] < 3 or arguments["num_accepted_tokens"] is not None:
            continue
        arguments["slots"][1], arguments["cu_seqlens"][2] = -1, 1
        expected = "got 3 for the end of row 2, expected one more than for the row before"
        assert f"cu_seqlens: {expected}" in (refusal(op, "torch", arguments) or "nothing")
        seen += 1
    assert seen


@pytest.mark.parametrize("op", WITH_SLOTS, ids=lambda op: op.name)
def test_a_compiled_call_refuses_them_too(op: Op[...]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    sample = next(s for s in op.make_samples("cpu") if op.bind(s.args, s.kwargs).get("slots") is not None)
    good = sample.clone()
    compiled(*good.args, **good.kwargs)
    name, _, arguments = next(case for case in wrong_calls(op, sample) if refusal(op, "torch", case[2]))
    before = Sample("", (), arguments).clone()
    with pytest.raises(ValueError, match=rf"^mamba_ops::{op.name}: {name}: got -?\d+ "):
        compiled(**arguments)
    assert_untouched(before, Sample("", (), arguments))
