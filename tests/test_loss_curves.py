"""Transformers' Mamba-2 under our ops trains as it does by itself."""

import pytest
import torch

pytest.importorskip("transformers", reason="what trains is a model of Transformers")

from benchmarks.loss_curves import allowed, curves, distances


@pytest.mark.slow
def test_ours_is_no_farther_from_stock_than_its_own_rounding() -> None:
    found = curves(30, 2, torch.device("cpu"))
    far = distances(found)
    assert set(far) == {"stock, float64", "ours, eager", "ours, compiled"}
    for losses in found.values():
        assert losses[-5:].mean() < losses[0] - 0.3  # it learns
    for name in ("ours, eager", "ours, compiled"):
        assert far[name] <= allowed(far), (name, far)
