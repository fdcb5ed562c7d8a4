"""Rows of so many chunks that Triton sums what turns them in more than one go."""

import pytest
import torch

from mamba_ops import mamba3_chunk_scan
from mamba_ops.registry import Sample
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge


@pytest.mark.slow
def test_a_row_of_more_than_2048_tokens() -> None:
    """Its angles are those of the oracle at the end, too, and it goes on from where its caches are."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    device, normal = ACCELERATOR or torch.device("cpu"), torch.randn
    lead, dim, dstate, angles = (1, 2200, 1), 4, 6, 3
    tokens = [normal(*lead, dim), normal(*lead).sigmoid(), -0.05 * normal(*lead).exp(), normal(*lead)]
    tokens += [normal(1, 2200, angles), normal(*lead, dstate), normal(*lead, dstate)]
    sizes = {"angle_state": (angles,), "ssm_state": (dim, dstate), "k_state": (dstate,), "v_state": (dim,)}
    caches = {name: normal(2, 1, *size).to(device) for name, size in sizes.items()}
    goes_on = {"slots": torch.tensor([1]).to(device), "has_initial_state": torch.tensor([True]).to(device)}
    sample = Sample("long", (*(t.to(device) for t in tokens), 64), {**caches, **goes_on})
    judge(mamba3_chunk_scan, sample, front_on(mamba3_chunk_scan, "triton"))
