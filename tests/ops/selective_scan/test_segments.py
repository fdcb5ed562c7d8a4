"""How rows are cut into segments changes no bit."""

import importlib
from itertools import accumulate
from typing import Any

import pytest
import torch

from mamba_ops import selective_scan
from mamba_ops.ops._triton import prepared
from mamba_ops.registry import Sample
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge

CHUNK = 8
LENGTHS = (25, 0, 3, 8, 49)
DIM, DSTATE = 5, 4


def call(lengths: tuple[int, ...], dtype: torch.dtype, *, dim: int = DIM, dstate: int = DSTATE) -> dict[str, Any]:
    """Packed rows, all with states to begin with."""
    device, tokens = ACCELERATOR or torch.device("cpu"), sum(lengths)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "x": normal(tokens, dim),
        "dt": normal(tokens, dim) - 2,
        "A": -normal(dim, dstate, dtype=torch.float32).exp(),
        "B": normal(tokens, dstate),
        "C": normal(tokens, dstate),
        "D": normal(dim, dtype=torch.float32),
        "z": normal(tokens, dim),
        "dt_softplus": True,
        "ssm_state": normal(len(lengths), dim, dstate, dtype=torch.float32),
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        "has_initial_state": torch.tensor([True] * len(lengths), device=device),
    }


def run(monkeypatch: pytest.MonkeyPatch, segment: int, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the states, with segments of so many chunks."""
    launch = importlib.import_module("mamba_ops.ops.selective_scan.triton.launch")
    monkeypatch.setattr(launch, "CHUNK", CHUNK)
    monkeypatch.setattr(launch, "_segment", lambda *_: segment)
    prepared.forget()
    state = arguments["ssm_state"].clone()
    return front_on(selective_scan, "triton")(**arguments | {"ssm_state": state}), state


@pytest.fixture(autouse=True)
def forget() -> Any:
    """What other tests launch is chosen anew."""
    pytest.importorskip("triton")
    yield
    prepared.forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segments_of_any_number_of_chunks_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    arguments = call(LENGTHS, dtype)
    output, state = run(monkeypatch, 1, arguments)
    for segment in (2, 3, 100):
        again, state_again = run(monkeypatch, segment, arguments)
        assert torch.equal(output, again)
        assert torch.equal(state, state_again)


def test_a_row_is_as_alone_in_longer_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = call(LENGTHS, torch.float32)
    output, state = run(monkeypatch, 1, arguments)
    first = sum(LENGTHS[:4])
    alone = {name: arguments[name][first:] for name in ("x", "dt", "B", "C", "z")}
    alone |= {
        "cu_seqlens": arguments["cu_seqlens"][4:] - first,
        "has_initial_state": arguments["has_initial_state"][4:],
    }
    alone["ssm_state"] = arguments["ssm_state"][4:].clone()
    output_alone, state_alone = run(monkeypatch, 4, arguments | alone)
    assert torch.equal(output[first:], output_alone)
    assert torch.equal(state[4:], state_alone)


@pytest.mark.parametrize("segment", [1, 3])
def test_they_are_right(monkeypatch: pytest.MonkeyPatch, segment: int) -> None:
    arguments = call(LENGTHS, torch.float32)
    run(monkeypatch, segment, arguments)  # which is remembered
    positional = tuple(arguments.pop(name) for name in ("x", "dt", "A", "B", "C"))
    judge(selective_scan, Sample("segments", positional, arguments), front_on(selective_scan, "triton"))
