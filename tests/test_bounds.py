"""Where no value is checked, as on a device: kernels stay within the call's tensors, whatever indices they are given.

The kernels are called without the op around them, on memory with a margin on both sides.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.ops._common.slots import never_decreasing, row_at
from mamba_ops.registry import Op, Sample
from tests.harness import OPS, backends_here
from tests.test_values import CACHES, CPU, arguments_of, wrong_calls

pytestmark = pytest.mark.usefixtures("no_grad")
SENTINEL = 7.25
SAMPLES = {  # one of each way in which kernels read rows; the first of them every day on Triton's interpreter
    "causal_conv1d": ["packed", "base", "everything"],
    "causal_conv1d_update": ["speculative, packed", "base", "packed"],
    "gated_delta_rule_update": ["speculative, write slots", "base", "packed, empty row"],
    "chunk_gated_delta_rule": ["packed, write slots", "base"],
    "kda_update": ["speculative, write slots", "base", "packed, empty row"],
    "chunk_kda": ["packed, write slots", "base"],
    "mamba_chunk_scan": ["packed, initial states", "initial states", "write slots", "chunk states, packed"],
    "mamba3_chunk_scan": ["packed, initial states", "base", "write slots"],
    "mamba3_state_update": ["speculative, packed, write slots", "base", "packed", "rows, write slots"],
    "selective_state_update": ["speculative packed", "base", "packed", "write slots"],
    "selective_scan": ["packed, write slots", "prefix cache", "base"],
    "rms_norm": ["everything", "base", "heads", "odd channels"],
}


LONG = (
    "chunk_gated_delta_rule",
    "chunk_kda",
    "mamba3_chunk_scan",
    "mamba_chunk_scan",
    "selective_scan",
)  # in the interpreter, for every day


WITHOUT_INDICES = ["rms_norm"]


def kernels(indexed: bool) -> Iterator[Any]:
    for op in (op for op in OPS if (op.name in WITHOUT_INDICES) is not indexed):
        for backend in (name for name in backends_here(op, CPU) if name in op.kernels):
            for number, name in enumerate(SAMPLES[op.name]):
                [sample] = [s.to(torch.float32) for s in op.make_samples("cpu") if s.name == name]
                is_long = backend == "triton" and (number or op.name in LONG)
                marks = pytest.mark.slow if is_long else ()
                yield pytest.param(op, backend, sample, id=f"{op.name}-{backend}-{name}", marks=marks)


KERNELS = list(kernels(indexed=True))


class Guarded:
    """A copy of a tensor in the middle of a buffer that is full of one number."""

    def __init__(self, tensor: Tensor) -> None:
        self.margin = 8 * tensor.numel() + 4096
        self.buffer = torch.full((tensor.numel() + 2 * self.margin,), SENTINEL, dtype=tensor.dtype)
        self.tensor = self.buffer[self.margin : self.margin + tensor.numel()].view(tensor.shape)
        self.tensor.copy_(tensor)

    @property
    def is_kept(self) -> bool:
        """Whether both margins are as they were."""
        inside = slice(self.margin, self.margin + self.tensor.numel())
        return bool((self.buffer[: inside.start] == SENTINEL).all() and (self.buffer[inside.stop :] == SENTINEL).all())


def run(op: Op[...], backend: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a kernel leaves in the tensors that it writes; raise AssertionError if any other memory has changed."""
    floats = {n: Guarded(a) for n, a in arguments.items() if isinstance(a, Tensor) and a.is_floating_point()}
    call = {**arguments, **{n: guarded.tensor for n, guarded in floats.items()}}
    before = {n: guarded.buffer.clone() for n, guarded in floats.items()}
    call["output"] = call.pop("out")
    op.kernels[backend].function(**call)
    written = {"out" if n == "output" else n for n in op.mutates}
    for name, guarded in floats.items():
        assert guarded.is_kept if name in written else torch.equal(guarded.buffer, before[name]), name
    return {name: floats[name].tensor for name in written & floats.keys()}


@pytest.mark.parametrize(("op", "backend", "sample"), KERNELS)
def test_memory_of_others_is_left_alone(op: Op[...], backend: str, sample: Sample) -> None:
    seen = set()
    for name, way, arguments in wrong_calls(op, sample):
        run(op, backend, arguments)
        seen.add((name, way))
    assert len(seen) >= 2


@pytest.mark.parametrize(("op", "backend", "sample"), list(kernels(indexed=False)))
def test_memory_of_others_is_left_alone_where_there_are_no_indices(op: Op[...], backend: str, sample: Sample) -> None:
    run(op, backend, arguments_of(op, sample))


@pytest.mark.parametrize(("op", "backend", "sample"), KERNELS)
def test_a_slot_beyond_the_cache_is_the_null_slot(op: Op[...], backend: str, sample: Sample) -> None:
    """Bit for bit, in either table, with no cache touched for it."""
    arguments, seen = arguments_of(op, sample), 0
    slots = next(c.shape[0] for n in CACHES if (c := arguments.get(n)) is not None)
    for name in ("slots", "write_slots"):
        count = 0 if arguments.get(name) is None else arguments[name].numel()
        for number in range(count if backend == "torch" else min(count, 1)):
            results = []
            for value in (-1, slots):
                table = arguments[name].clone()
                table.view(-1)[number] = value
                results.append(run(op, backend, {**arguments, name: table}))
            for written in results[0]:
                assert torch.equal(results[0][written], results[1][written]), (name, number, written)
            seen += 1
    assert seen or sample.name in ("base", "initial states")


# NumPy says so where Triton is interpreted, on some processors.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("op", "backend", "sample"), KERNELS)
def test_an_infinite_parameter_does_not_reach_padding(op: Op[...], backend: str, sample: Sample) -> None:
    """Outputs of a padding row are zero whatever the numbers are that all rows share."""
    arguments = arguments_of(op, sample)
    if arguments.get("slots") is None:
        return
    slots, seen = arguments["slots"].clone(), 0
    slots[0] = -1
    arguments["slots"], arguments["null_slot"] = slots, -1
    is_zero = run(op, backend, arguments)["out"] == 0
    for name in ("A", "D", "dt_bias", "A_log", "weight", "bias"):
        if isinstance(arguments.get(name), Tensor):
            infinite = torch.full(arguments[name].shape, torch.inf)
            assert not run(op, backend, {**arguments, name: infinite})["out"][is_zero].any(), name
            seen += 1
    assert is_zero.any()
    assert seen or op.name in ("chunk_gated_delta_rule", "chunk_kda")


@pytest.mark.parametrize(
    ("op", "backend", "sample"), [k for k in KERNELS if k.values[2].kwargs.get("cu_seqlens") is not None]
)
def test_rows_end_where_the_tokens_do(op: Op[...], backend: str, sample: Sample) -> None:
    """A last row that goes on past the tokens has those that there are; one that starts before them, from the first."""
    arguments = arguments_of(op, sample)
    if arguments.get("block_size"):
        pytest.skip("there chunk_ends says where rows end")
    bounds, tokens = arguments["cu_seqlens"], arguments["out"].shape[0]
    right = run(op, backend, {**arguments, "cu_seqlens": torch.where(bounds == bounds[-1], tokens, bounds)})
    wrong = torch.where(bounds == bounds[-1], tokens + 50, bounds)
    wrong[0] -= 3
    found = run(op, backend, {**arguments, "cu_seqlens": wrong})
    assert right
    for name, tensor in right.items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.parametrize("ends", [[], [0], [3], [9], [0, 0, 4, 4, 9], [2, 5, 7], [9, 9]], ids=str)
def test_rows_are_found_as_by_bucketize(ends: list[int]) -> None:
    """Which exported programs cannot use: empty rows, and places after the last row, are among the calls."""
    places = torch.arange(9)
    assert torch.equal(row_at(torch.tensor(ends).long(), 9), torch.bucketize(places, torch.tensor(ends), right=True))


def test_bounds_never_decrease() -> None:
    for right in ([0, 0, 3, 9], [2, 5, 9], [4], []):
        assert torch.equal(never_decreasing(torch.tensor(right).int(), 0, 9), torch.tensor(right).long())
    for wrong in ([5, 2, 7, -3, 40], [-9, 12, 3], [9, 0, 9, 0]):
        found = never_decreasing(torch.tensor(wrong), 0, 9)
        assert (found.diff() >= 0).all()
        assert 0 <= found.min() <= found.max() <= 9
