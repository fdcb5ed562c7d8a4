"""FlashInfer missing, broken, too old, or without a compiler: the sentence says what to install."""

import inspect
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mamba_ops import (
    chunk_gated_delta_rule,
    chunk_kda,
    gated_delta_rule_update,
    kda_update,
    registry,
    selective_state_update,
)
from mamba_ops.registry import Op
from mamba_ops.testing.judge import refusal
from tests.on_flashinfer import stand_in
from tests.on_flashinfer import stand_in_delta_rule as delta_rule
from tests.on_flashinfer.calls import Calls, refused, sample_of, samples_of

vendor = import_module("mamba_ops.backends.flashinfer")
flashinfer = vendor.flashinfer
OPS = [selective_state_update, gated_delta_rule_update, chunk_gated_delta_rule, kda_update, chunk_kda]


def base_refused() -> str:
    registry.dispatcher.dispatcher.changed()
    return refused(selective_state_update, sample_of(selective_state_update, "base"))


@pytest.mark.usefixtures("unasked")
def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer, "requires", "flashinfer_that_is_not_there")
    assert base_refused() == "flashinfer_that_is_not_there is not installed; pip install 'mamba-ops[flashinfer]'"


@pytest.mark.usefixtures("unasked")
def test_a_broken_package(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_flashinfer.py").write_text("import tvm_ffi_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flashinfer, "requires", "broken_flashinfer")
    with pytest.warns(
        RuntimeWarning, match="backend flashinfer: broken_flashinfer is installed but cannot be imported"
    ):
        assert base_refused() == (
            "broken_flashinfer is installed but cannot be imported: ModuleNotFoundError: No module named "
            "'tvm_ffi_that_is_not_there'; pip install 'mamba-ops[flashinfer]' has what it needs"
        )


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(("version", "fine"), [("0.7.1", False), ("0.6.18rc1", False), ("0.7.2", True), ("0.10", True)])
def test_versions(version: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor, "capability", lambda device: (9, 0))
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    sentence = (
        f"flashinfer {version} is installed, and 0.7.2 is the oldest that will do; "
        "pip install -U 'mamba-ops[flashinfer]'"
    )
    with stand_in.installed(version):
        assert flashinfer._try_import() == (None if fine else sentence)
        if not fine:
            assert base_refused() == sentence


@pytest.mark.usefixtures("unasked")
def test_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with stand_in.installed():
        assert base_refused() == (
            "flashinfer runs on CUDA, and this torch is built for ROCm; with one for CUDA, "
            "pip install 'mamba-ops[flashinfer]'"
        )


@pytest.mark.usefixtures("unasked")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    nothing = SimpleNamespace(which=lambda name: None, exists=lambda: False)
    monkeypatch.setattr(vendor, "shutil", nothing)
    monkeypatch.setattr(vendor, "Path", lambda path: nothing)
    with stand_in.installed():
        assert base_refused() == (
            "flashinfer compiles its kernels, and there is no CUDA compiler (nvcc) here; install CUDA's toolkit, "
            "or pip install 'mamba-ops[flashinfer]' flashinfer-jit-cache"
        )


def test_the_stand_in_has_the_vendors_signatures() -> None:
    """Where the real package is installed; a newer one has more arguments, which may be left out."""
    pytest.importorskip("flashinfer")
    pairs = {
        ("flashinfer.mamba", "selective_state_update"): stand_in.selective_state_update,
        ("flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose"): (
            delta_rule.gated_delta_rule_decode_pretranspose
        ),
        ("flashinfer.gdn_prefill", "chunk_gated_delta_rule"): delta_rule.chunk_gated_delta_rule,
        ("flashinfer.kda", "recurrent_kda"): delta_rule.recurrent_kda,
        ("flashinfer.cudnn", "cudnn_recurrent_kda"): delta_rule.cudnn_recurrent_kda,
    }
    for (module, name), ours in pairs.items():
        real = getattr(pytest.importorskip(module), name)
        theirs, mine = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (real, ours)
        )
        assert theirs[: len(mine)] == mine, name
        assert all(default is not inspect.Parameter.empty for *_, default in theirs[len(mine) :]), name


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_some_samples_are_taken(op: Op[...], calls: Calls, capability: Callable[[int, int], None]) -> None:
    """Else the tests of all ops would say nothing about this backend."""
    capability(10, 0)
    assert sum(refusal(op, "flashinfer", sample) is None for sample in samples_of(op)) >= 2
