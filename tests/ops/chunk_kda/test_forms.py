"""The two forms of the walk over chunks, of which a device runs one: with values as rows, and with tokens as rows."""

import importlib
from typing import Any

import pytest
import torch

from mamba_ops.ops._triton import prepared
from mamba_ops.ops.chunk_kda import chunk_kda
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge

pytest.importorskip("triton")


@pytest.mark.parametrize("joined", [False, True], ids=["values as rows", "tokens as rows"])
def test_every_form(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("mamba_ops.ops.chunk_kda.triton.launch")
    rule = launch._launches

    def changed(*sizes: Any) -> dict[str, dict[str, Any]]:
        launches = rule(*sizes)
        return {**launches, "_scan": {**launches["_scan"], "JOINED": joined}}

    monkeypatch.setattr(launch, "_launches", changed)
    prepared.forget()
    try:
        for sample in chunk_kda.make_samples(ACCELERATOR or torch.device("cpu")):
            judge(chunk_kda, sample, front_on(chunk_kda, "triton"))
    finally:
        prepared.forget()
