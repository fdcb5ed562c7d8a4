"""What only a GPU shows: Triton's compiles, and planted defects of devices on the device itself."""

import inspect

import pytest
import torch

from compile_tests.planted import decode
from mamba_ops.audit import audit
from tests.conftest import ACCELERATOR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ACCELERATOR is None, reason="needs an accelerator, and there is none"),
]
SHAPES = [(4, 8), (6, 8), (9, 8)]


@pytest.mark.parametrize(("name", "cause"), [("Launch", "triton"), ("ToHost", "host-copy")])
def test_planted_on_the_device(name, cause):
    launch = pytest.importorskip("compile_tests.planted.launch")
    report = audit(getattr(launch, name)(), torch.ones(4, 8), device=ACCELERATOR, shapes=SHAPES)
    serious = [finding for finding in report.findings if finding.severity != "note"]
    assert [finding.cause for finding in serious] == [cause]
    assert "# planted" in serious[0].where.source
    twin = audit(getattr(launch, f"{name}Twin")(), torch.ones(4, 8), device=ACCELERATOR, shapes=SHAPES)
    assert twin.clean


@pytest.mark.parametrize(
    ("factory", "expected"),
    [("as_input", ["capture-input"]), ("refused", ["refusal"]), ("twin", [])],
)
def test_our_ops_on_the_device(factory, expected):
    """With CUDA graphs: what Inductor itself says of them."""
    pytest.importorskip("triton")
    model, inputs = getattr(decode, factory)()
    report = audit(model, *inputs, device=ACCELERATOR, mode="reduce-overhead", calls=[inputs] * 3)
    assert [finding.cause for finding in report.findings if finding.severity != "note"] == expected
    assert all("# planted" in f.where.source for f in report.findings if f.severity != "note")
    assert report.backends["selective_state_update"].startswith("torch" if factory == "refused" else "triton")


def test_compiles_while_serving_are_found():
    launch = pytest.importorskip("compile_tests.planted.launch")
    report = audit(launch.CompiledPerSize(), torch.ones(4, 8), device=ACCELERATOR, shapes=SHAPES)
    found = {finding.cause: finding for finding in report.findings}
    assert found["jit-later"].op == "_per_size"
    assert found["jit-later"].count == 2
    assert found["jit-later"].where.file == inspect.getsourcefile(launch)
    assert "# jit" in found["jit-later"].where.source
    assert found["jit-first"].severity == "note"
    assert [row.jit for row in report.calls] == [1, 1, 1]
    assert found["disable"].where.source.endswith("# planted")
