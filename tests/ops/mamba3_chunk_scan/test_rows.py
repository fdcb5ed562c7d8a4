"""Rows of Mamba-3's ops are what they are alone, bit for bit, whatever other rows there are."""

from typing import Any

import pytest
import torch

import mamba_ops
from mamba_ops import use_backend

ROWS, HEADS, DIM, DSTATE = 7, 3, 7, 10
CACHES = ("angle_state", "ssm_state", "k_state", "v_state")


def call_of(op: Any, length: int, rank: tuple[int, ...]) -> dict[str, Any]:
    """A call with odd sizes, so that rows begin anywhere in a vector."""
    torch.manual_seed(0)
    lead, normal = (ROWS, length) if op is mamba_ops.mamba3_chunk_scan or length > 1 else (ROWS,), torch.randn
    call = {"x": normal(*lead, HEADS, DIM), "dt": normal(*lead, HEADS).sigmoid(), "A": -normal(*lead, HEADS).exp()}
    call |= {"trap": normal(*lead, HEADS), "angles": normal(*lead, 3), "z": normal(*lead, HEADS, DIM)}
    call |= {name: normal(*lead, *rank, 1, DSTATE) for name in ("B", "C")}
    sizes = ((HEADS, 3), (HEADS, DIM, DSTATE), (*rank, HEADS, DSTATE), (HEADS, DIM))
    call |= {name: normal(ROWS, *size) for name, size in zip(CACHES, sizes, strict=True)}
    call |= {"D": normal(HEADS)}
    call |= {name: normal(HEADS, *rank, DIM) for name in ("mimo_x", "mimo_z", "mimo_o") if rank}
    if op is mamba_ops.mamba3_chunk_scan:
        call |= {"chunk_size": 4, "has_initial_state": torch.ones(ROWS, dtype=torch.bool)}
    return call


@pytest.mark.parametrize("length", [1, 3, 9])
@pytest.mark.parametrize("rank", [(), (1,), (4,)], ids=["siso", "a rank of 1", "a rank of 4"])
@pytest.mark.parametrize("op", [mamba_ops.mamba3_chunk_scan, mamba_ops.mamba3_state_update], ids=lambda op: op.name)
def test_rows_are_as_alone(op: Any, rank: tuple[int, ...], length: int) -> None:
    call = call_of(op, length, rank)

    def results(rows: slice) -> list[torch.Tensor]:
        of_rows = {n for n, v in call.items() if isinstance(v, torch.Tensor) and v.shape[0] == ROWS}
        mine = {n: v[rows].clone() if n in of_rows else v for n, v in call.items()}
        with use_backend("torch"):
            return [op(**mine), *(mine[name] for name in CACHES)]

    together = results(slice(None))
    for row in range(ROWS):
        alone = results(slice(row, row + 1))
        assert all(torch.equal(whole[row], one[0]) for whole, one in zip(together, alone, strict=True))
