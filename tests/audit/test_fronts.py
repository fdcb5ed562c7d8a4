"""Models that import kernels of other libraries themselves: the report says which of our functions take their place."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from mamba_ops.audit import Report
from mamba_ops.audit.fronts import fronts, in_place
from mamba_ops.audit.show import closing_lines
from mamba_ops.commands.audit import tried
from mamba_ops.commands.audit.target import Options, load_calls, run_here

PACKAGES = {  # in the places of the originals, with their signatures; each disables the compiler, as fla does
    "mamba_ssm/ops/selective_scan_interface.py": """
import torch
@torch.compiler.disable
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, **others):
    return u * delta
@torch.compiler.disable
def bimamba_inner_fn(*args):
    return args[0]
""",
    "causal_conv1d/causal_conv1d_interface.py": """
import torch
@torch.compiler.disable
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    return x * weight[:, -1:]
""",
    "causal_conv1d/__init__.py": "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn",
    "fla/ops/gated_delta_rule/chunk.py": """
def chunk_gated_delta_rule(q, k, v, g, beta, **others):
    return v, None
""",
    "vllm/model_executor/layers/mamba/ops/causal_conv1d.py": """
def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, **others):
    return x
""",
}
MODELS = """
import torch
import causal_conv1d
import fla.ops.gated_delta_rule.chunk as rule
from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, selective_scan_fn
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update as update

class Mixer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 4))
        self.A = torch.nn.Parameter(-torch.rand(8, 4))

    def forward(self, x):
        u = causal_conv1d.causal_conv1d_fn(x, self.weight, activation="silu")
        B = C = u[:, :4]
        return selective_scan_fn(u, u.sigmoid(), self.A, B, C)

class Others(torch.nn.Module):
    def forward(self, x):
        if x.shape[0] == 100:
            torch.ops.vllm.mamba_mixer2(x, x, "layers.0")
            bimamba_inner_fn(x)
            update(x, x, x)
        return rule.chunk_gated_delta_rule(x, x, x, x, x)[0]

class Neither(torch.nn.Module):
    def forward(self, x):
        return x

def mixer(): return Mixer(), [torch.randn(2, 8, length) for length in (6, 9)]
def others(): return Others(), torch.randn(2, 8)
def neither(): return Neither(), torch.randn(2, 8)
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch):
    """Return the name of a factory in MODELS, with the packages on the path."""
    for name, text in PACKAGES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "their_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield "their_models:{}".format
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d", "fla", "vllm", "their_models"):
            del sys.modules[name]


SCAN = "mamba_ssm.ops.selective_scan_interface.selective_scan_fn"
CONV = "causal_conv1d.causal_conv1d_interface.causal_conv1d_fn"


def test_functions_that_a_model_imports_are_named_with_ours(target) -> None:
    found = {name: fronts(load_calls(Options(target(name)))[0]) for name in ("mixer", "others", "neither")}
    chunk, vllm = "chunk_gated_delta_rule", "vllm.model_executor.layers.mamba.ops.causal_conv1d"
    assert found == {
        "mixer": {
            CONV: "mamba_ops.compat.causal_conv1d.causal_conv1d_fn",
            SCAN: "mamba_ops.compat.mamba_ssm.selective_scan_fn",
        },
        "others": {
            f"fla.ops.gated_delta_rule.chunk.{chunk}": f"mamba_ops.compat.fla.{chunk}",
            "mamba_ssm.ops.selective_scan_interface.bimamba_inner_fn": "",
            "torch.ops.vllm.mamba_mixer2": "torch.ops.mamba_ops_vllm.mamba_mixer2",
            f"{vllm}.causal_conv1d_update": "mamba_ops.compat.vllm.causal_conv1d_update",
        },
        "neither": {},
    }


def test_they_are_replaced_while_they_are_tried(target) -> None:
    model, _ = load_calls(Options(target("mixer")))
    file, package = sys.modules["their_models"], sys.modules["causal_conv1d"]
    before = file.selective_scan_fn, package.causal_conv1d_fn
    with in_place(model) as bound:
        assert bound
        assert file.selective_scan_fn.__module__ == "mamba_ops.compat.mamba_ssm.selective_scan"
        assert package.causal_conv1d_fn.__module__ == "mamba_ops.compat.causal_conv1d"
    assert (file.selective_scan_fn, package.causal_conv1d_fn) == before


def test_what_they_would_change_ends_the_report(target) -> None:
    options = Options(target("mixer"))
    report = Report(options.target)
    run_here(options, report, lambda step: None)
    tried.try_changes(options, report, 300.0, lambda step: None)
    told = closing_lines(Report.from_json(report.to_json()))
    together, first, second, heading, before, after = told
    assert together.startswith("All that helped, together: torch.compile(..., dynamic=True) and mamba_ops.compat")
    assert first == (
        f"{CONV}: use_mamba_ops does not bind it, as the model's own code calls it. "
        "Call mamba_ops.compat.causal_conv1d.causal_conv1d_fn in its place."
    )
    assert second.startswith(f"{SCAN}: ")
    assert heading == "mamba_ops.compat in place of the imported functions, tried on this model:"
    assert ", 2 breaks" in before
    assert after.startswith("  after:  1 graph, 0 breaks")
