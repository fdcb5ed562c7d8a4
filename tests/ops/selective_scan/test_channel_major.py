"""Channels or tokens contiguous: the kernels are the same, and so is every bit, in every run."""

import pytest
import torch

pytest.importorskip("triton")

from mamba_ops import selective_scan, use_backend
from mamba_ops.ops._common.bench import channel_major
from mamba_ops.ops.selective_scan.bench import OF_TOKENS, case
from tests.conftest import ACCELERATOR

RUNS = 2 if ACCELERATOR is None else 20


@pytest.mark.parametrize("inference", [False] if ACCELERATOR is None else [False, True])
@pytest.mark.parametrize("lengths", [(130, 64, 3)] if ACCELERATOR is None else [(8192,), (1024,) * 8], ids=str)
def test_copies_of_inputs_change_no_bit(lengths: tuple[int, ...], inference: bool) -> None:
    """Activations are copied to kernels and back in tiles: a tile that came late would show in some run, and so would
    the copies of an earlier one."""
    device = torch.device(ACCELERATOR or "cpu")
    given = case(lengths, device, dim=72 if ACCELERATOR is None else 8192)
    results = []
    for each in (given, *[channel_major(given, *OF_TOKENS)] * RUNS):
        states = {name: cache.clone() for name, cache in each.caches.items()}
        out = each.out.fill_(float("nan"))
        with use_backend("triton"), torch.inference_mode(inference):
            selective_scan(**each.arguments, **states, out=out)
        results.append((out.clone(), states["ssm_state"]))
    for number, found in enumerate(results[1:]):
        for name, got, expected in zip(("output", "ssm_state"), found, results[0], strict=True):
            apart = int((got != expected).sum())
            assert not apart, f"{name} of run {number}: {apart} of {got.numel()} numbers differ"
