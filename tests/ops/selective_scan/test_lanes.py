"""The scan of many rows, whose lanes share states: its bits are those of few rows, and bugs in it are caught."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_ops import selective_scan
from mamba_ops.ops._triton import launch_config, prepared
from mamba_ops.registry import Backend, Sample
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge
from tests.ops.selective_scan.test_segments import CHUNK, LENGTHS
from tests.ops.selective_scan.test_segments import call as packed_rows

pytest.importorskip("triton")

DIM = 40  # lanes have two channels of these, some of them one
FEW, MANY = 1 << 60, 0
SLOW = pytest.mark.slow if ACCELERATOR is None else ()  # interpreted
CASES = [
    (torch.float32, 13),
    (torch.bfloat16, 16),
    pytest.param(torch.bfloat16, 8, marks=SLOW),
    pytest.param(torch.float16, 16, marks=SLOW),
]


def call(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float32, dstate: int = 16) -> dict[str, Any]:
    """Packed rows with slots, one of them padding, that begin with states or without and move them."""
    arguments, rows = packed_rows(lengths, dtype, dim=DIM, dstate=dstate), len(lengths)
    device = arguments["x"].device
    return arguments | {
        "dt_bias": arguments["D"] * 0.5,
        "ssm_state": torch.cat([arguments["ssm_state"]] * 2),
        "slots": torch.tensor([*range(rows - 2), -1, rows - 1], dtype=torch.int32, device=device),
        "write_slots": torch.arange(rows, 2 * rows, dtype=torch.int32, device=device),
        "has_initial_state": torch.arange(rows, device=device) % 2 == 0,
    }


def run(arguments: dict[str, Any], many: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the states, by lanes where there are so many channels."""
    launch = importlib.import_module("mamba_ops.ops.selective_scan.triton.launch")
    launch.MANY = many
    prepared.forget()
    state = arguments["ssm_state"].clone()
    return front_on(selective_scan, "triton")(**arguments | {"ssm_state": state}), state


@pytest.fixture(autouse=True)
def segments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """States in few threads, as on GPUs; short chunks, and what other tests launch is chosen anew."""
    launch = importlib.import_module("mamba_ops.ops.selective_scan.triton.launch")
    for name, value in (("MANY", MANY), ("WIDEST", 16), ("CHUNK", CHUNK)):
        monkeypatch.setattr(launch, name, value)
    launch_config.forget("selective_scan")
    yield launch
    launch_config.forget("selective_scan")


@pytest.mark.parametrize("segment", [1, 100])
@pytest.mark.parametrize(("dtype", "dstate"), CASES, ids=str)
def test_bits_are_those_of_few_rows(
    monkeypatch: pytest.MonkeyPatch, segments: Any, dtype: torch.dtype, dstate: int, segment: int
) -> None:
    """However many segments there are, and in any layout of the activations."""
    monkeypatch.setattr(segments, "_segment", lambda *_: segment)
    arguments = call(dtype=dtype, dstate=dstate)
    expected = run(arguments, FEW)
    used = []
    launch_of_lanes = segments._launch_of_lanes
    monkeypatch.setattr(segments, "_launch_of_lanes", lambda *sizes: used.append(sizes) or launch_of_lanes(*sizes))
    channel_major = {name: arguments[name].t().contiguous().t() for name in ("x", "dt", "z")}
    for many in (arguments, arguments | channel_major):
        assert all(map(torch.equal, run(many, MANY), expected))
    assert len(used) == 2


@pytest.mark.parametrize("length", [0, 1, 3, 4, 19])
def test_bits_of_rows_of_one_length(length: int) -> None:
    arguments = call((length, length), torch.float32)
    del arguments["cu_seqlens"]
    for name in ("x", "dt", "B", "C", "z"):
        arguments[name] = arguments[name].unflatten(0, (2, length))
    assert all(map(torch.equal, run(arguments, MANY), run(arguments, FEW)))


@pytest.mark.parametrize("bare", [False, True], ids=["all", "bare"])
def test_it_is_right(bare: bool) -> None:
    arguments = call()
    if bare:
        for name in ("D", "z", "dt_bias", "slots", "write_slots", "has_initial_state", "ssm_state"):
            del arguments[name]
    positional = tuple(arguments.pop(name) for name in ("x", "dt", "A", "B", "C"))
    judge(selective_scan, Sample("many rows", positional, arguments), front_on(selective_scan, "triton"))


def test_numbers_that_are_not_finite_stay_in_their_row() -> None:
    arguments = call()
    expected, states = run(arguments, MANY)
    first = sum(LENGTHS[:4])
    for name in ("x", "dt", "B", "C", "z"):
        arguments[name][first:] = float("nan")
    output, after = run(arguments, MANY)
    assert torch.equal(output[:first], expected[:first])
    assert torch.equal(after[:-1], states[:-1])
    assert output[first:].isnan().all()


BUGS = {
    "step of another token": ("step = tl.gather(step, of_lane, 0)", "pass"),
    "input of another token": ("push = tl.gather(push, of_lane, 0)", "pass"),
    "a level of sums left out": ("mine = halved(mine, APART << level, LANES)", "mine = mine[: len(mine) // 2]"),
    "parts of the last tokens not added": (
        "mine = (mine[0] + swapped(mine[0], APART << level, LANES),)",
        "mine = (mine[0],)",
    ),
    "D of the first channel": ("tl.fma(now[PER * i], skip[i], y)", "tl.fma(now[PER * i], skip[0], y)"),
    "gate of the first channel": ("silu(now[PER * i + 2], BITS)", "silu(now[2], BITS)"),
    "bias of the first channel": ("bias[i], SOFTPLUS)", "bias[0], SOFTPLUS)"),
    "state of the first channel": ("of_state = channel + i * APART", "of_state = channel"),
    "gates of one tile": ("of_z += advance(more, z_token, PARTS)", "pass"),
    "one tile's B": ("of_B += advance(more, B_token, PARTS)", "pass"),
    "rest of a row left out": ("for _ in range(until, high):", "for _ in range(until, until):"),
    "the rest's first token alone": ("        at += 1", "        at += 0"),
    "chunks not joined": ("if (end < high) & (end == begin + CHUNK):", "if False:"),
    "padding not zero": ("tl.zeros([LANES], tl.float32)", "tl.full([LANES], 1.0, tl.float32)"),
}


@pytest.mark.parametrize("bug", [None, *(pytest.param(b, marks=SLOW if i > 3 else ()) for i, b in enumerate(BUGS))])
def test_planted_bug_is_caught(bug: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without one the kernel that bugs are planted in gives the right bits."""
    from tests.test_mutants import triton_with

    kernel = triton_with(BUGS[bug] if bug else ("at += 1", "at += 1"), selective_scan, tmp_path)
    own = {"MANY": MANY, "WIDEST": 16, "CHUNK": CHUNK, "_segment": lambda *_: 100}  # rows are not cut
    for name, value in own.items():
        monkeypatch.setitem(kernel.__globals__, name, value)
    backend = Backend("mutant", devices=[(ACCELERATOR or torch.device("cpu")).type])
    try:
        backend.implements(selective_scan)(kernel)
        arguments = call()
        expected = run(arguments, FEW)
        state = arguments["ssm_state"].clone()
        output = front_on(selective_scan, "mutant")(**arguments | {"ssm_state": state})
    finally:
        backend.remove()
    assert (torch.equal(output, expected[0]) and torch.equal(state, expected[1])) == (bug is None)
