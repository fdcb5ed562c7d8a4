"""Forms of kernels of which a device runs one: every sample of an op on each."""

import importlib
from typing import Any

import pytest
import torch

from mamba_ops.ops._triton import prepared
from mamba_ops.registry import Op
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge


def judge_form(op: Op[...], changes: dict[str, dict[str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge an op's samples on Triton where the launches of some kernels, by name, are changed."""
    launch = importlib.import_module(f"mamba_ops.ops.{op.name}.triton.launch")
    rule = launch._launches

    def changed(*sizes: Any) -> dict[str, dict[str, Any]]:
        return {kernel: {**chosen, **changes.get(kernel, {})} for kernel, chosen in rule(*sizes).items()}

    monkeypatch.setattr(launch, "_launches", changed)
    prepared.forget()
    try:
        samples = op.make_samples(ACCELERATOR or torch.device("cpu"))
        assert samples
        for sample in samples:
            judge(op, sample, front_on(op, "triton"))
    finally:
        prepared.forget()
