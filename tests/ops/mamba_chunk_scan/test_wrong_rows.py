"""Rows whose bounds are wrong."""

from typing import Any

import pytest
import torch

from mamba_ops import mamba_chunk_scan
from tests.conftest import ACCELERATOR
from tests.test_bounds import run


@pytest.mark.skipif(ACCELERATOR is not None, reason="looks around tensors of the CPU")
@pytest.mark.parametrize("ends", [(0, 250, 10, 260), (250, 0, 260, 40), (0, 9999, -5, 100)], ids=str)
def test_rows_that_go_back_write_nothing_else(ends: tuple[int, ...]) -> None:
    """Numbers of pieces and segments then fall from one row to the next; what is there besides stays as it was."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    tokens, heads, dim, dstate = 260, 2, 16, 16
    arguments: dict[str, Any] = {"x": torch.randn(tokens, heads, dim), "dt": torch.rand(tokens, heads)}
    arguments |= {"A": -torch.rand(heads), "B": torch.randn(tokens, 1, dstate), "C": torch.randn(tokens, 1, dstate)}
    arguments |= {"chunk_size": 64, "cu_seqlens": torch.tensor(ends, dtype=torch.int32)}
    arguments |= {"ssm_state": torch.randn(4, heads, dim, dstate), "slots": torch.tensor([3, 1, 0], dtype=torch.int32)}
    arguments |= {"chunk_states": torch.zeros(7, heads, dim, dstate), "out": torch.zeros(tokens, heads, dim)}
    bound = mamba_chunk_scan.bind((), arguments)
    found = run(mamba_chunk_scan, "triton", {**bound, "out": arguments["out"]})  # looks at all memory around tensors
    assert torch.equal(found["ssm_state"][2], arguments["ssm_state"][2])
