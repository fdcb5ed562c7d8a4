"""How rows are cut into segments changes no bit."""

import importlib
from itertools import accumulate
from typing import Any

import pytest
import torch

from mamba_ops import mamba_chunk_scan
from mamba_ops.ops._triton import prepared
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR

LENGTHS = (700, 0, 3, 64, 520)


def call(dtype: torch.dtype, heads: int, dim: int, groups: int, dstate: int) -> dict[str, Any]:
    """Packed rows, some with states to begin with."""
    device, tokens = ACCELERATOR or torch.device("cpu"), sum(LENGTHS)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "x": normal(tokens, heads, dim),
        "dt": normal(tokens, heads) - 4,
        "A": -normal(heads, dtype=torch.float32).exp(),
        "B": normal(tokens, groups, dstate),
        "C": normal(tokens, groups, dstate),
        "chunk_size": 64,
        "D": normal(heads, dtype=torch.float32),
        "dt_softplus": True,
        "ssm_state": normal(len(LENGTHS), heads, dim, dstate, dtype=torch.float32),
        "cu_seqlens": torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device),
        "has_initial_state": torch.arange(len(LENGTHS), device=device) != 2,
    }


def run(monkeypatch: pytest.MonkeyPatch, pieces: int, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the states, with segments of so many pieces."""
    launch = importlib.import_module("mamba_ops.ops.mamba_chunk_scan.triton.launch")
    monkeypatch.setattr(launch, "_segment", lambda *_: pieces)
    prepared.forget()
    state = arguments["ssm_state"].clone()
    return front_on(mamba_chunk_scan, "triton")(**arguments | {"ssm_state": state}), state


@pytest.fixture(autouse=True)
def forget() -> Any:
    """What other tests launch is chosen anew."""
    pytest.importorskip("triton")
    yield
    prepared.forget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 16, 1, 16), (2, 64, 1, 128)], ids=["one tile", "several"])
def test_segments_of_any_number_of_pieces_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sizes: tuple[int, int, int, int]
) -> None:
    if ACCELERATOR is None and sizes[-1] > 16:
        pytest.skip("on a CPU, NumPy sums a product's terms in an order that depends on the tile")
    arguments = call(dtype, *sizes)
    output, state = run(monkeypatch, 100, arguments)
    for pieces in (4, 5, 7):
        again, state_again = run(monkeypatch, pieces, arguments)
        assert torch.equal(output, again)
        assert torch.equal(state, state_again)
