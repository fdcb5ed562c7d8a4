"""The two forms of each kernel, of which a device runs one: the walk's has values as rows, or tokens."""

import importlib
from typing import Any

import pytest
import torch

from mamba_ops.ops._triton import prepared
from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import judge

pytest.importorskip("triton")


@pytest.mark.parametrize("joined", [False, True], ids=["values as rows", "tokens as rows"])
def test_every_form(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("mamba_ops.ops.chunk_gated_delta_rule.triton.launch")
    rule = launch._launches

    def changed(*sizes: Any) -> dict[str, dict[str, Any]]:
        launches = rule(*sizes)
        solve = {**launches["_solve"], "SQUARES": joined}
        return {"_solve": solve, "_scan": {**launches["_scan"], "JOINED": joined}}

    monkeypatch.setattr(launch, "_launches", changed)
    prepared.forget()
    try:
        for sample in chunk_gated_delta_rule.make_samples(ACCELERATOR or torch.device("cpu")):
            judge(chunk_gated_delta_rule, sample, front_on(chunk_gated_delta_rule, "triton"))
    finally:
        prepared.forget()
