"""Rows of several segments, as long as a GPU's are."""

from itertools import accumulate
from typing import Any

import pytest
import torch

from mamba_ops import mamba_chunk_scan
from mamba_ops.registry import Sample
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge

LENGTHS = (1100, 0, 30, 2500, 1024)
HEADS, DIM, DSTATE = 2, 16, 16


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 256, 100], ids=["no states of chunks", "chunks of 256", "chunks of 100"])
def test_rows_of_several_segments(dtype: torch.dtype, chunk: int | None) -> None:
    """Each goes on from its state, in packed rows, from wherever its first chunk begins."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device, rows, tokens = ACCELERATOR or torch.device("cpu"), len(LENGTHS), sum(LENGTHS)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    activations = [normal(tokens, HEADS, DIM), normal(tokens, HEADS) - 4, -normal(HEADS, dtype=torch.float32).exp()]
    activations += [normal(tokens, 1, DSTATE), normal(tokens, 1, DSTATE)]
    named: dict[str, Any] = {"dt_softplus": True, "D": normal(HEADS, dtype=torch.float32)}
    named |= {"ssm_state": normal(8, HEADS, DIM, DSTATE, dtype=torch.float32)}
    named |= {"cu_seqlens": torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device)}
    named |= {"slots": torch.tensor([3, 1, 6, 0, 5], dtype=torch.int32, device=device)}
    named |= {"has_initial_state": torch.tensor([True, True, False, True, False], device=device)}
    if chunk is not None:
        named |= {"num_computed_tokens": torch.tensor([70, 1, 0, 255, 99], dtype=torch.int32, device=device)}
        named |= {"chunk_states": normal(tokens // chunk + 2 * rows, HEADS, DIM, DSTATE, dtype=torch.float32)}
    judge(mamba_chunk_scan, Sample("long", (*activations, chunk or 256), named), front_on(mamba_chunk_scan, "triton"))
