"""`graph_audit` in somebody's tests: it passes what is one graph, and its failure holds the findings."""

import os
from pathlib import Path

import pytest
import torch

from mamba_ops.audit import Report
from mamba_ops.testing import assert_nothing_new
from tests import fresh

ROOT = Path(__file__).parents[2]
TESTS = """
import torch

class Breaks(torch.nn.Module):
    def forward(self, x):
        print("here")
        return x * 2

def test_good(graph_audit):
    report = graph_audit(torch.nn.Linear(8, 8), torch.ones(4, 8), shapes=[(4, 8), (5, 8), (7, 8)], dynamic=True)
    assert len(report.calls) == 3

def test_bad(graph_audit):
    graph_audit(Breaks(), torch.ones(4, 8))
"""


@pytest.mark.parametrize("how", ["installed", pytest.param("pytest_plugins", marks=pytest.mark.slow)])
def test_the_fixture(how: str, tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(TESTS)
    options = ["-p", "no:cacheprovider", "-q"]
    if how == "installed":  # what the entry point loads, and once alone, whether or not this checkout is installed
        options += ["-p", "no:mamba_ops", "-p", "mamba_ops_pytest"]
    else:
        (tmp_path / "conftest.py").write_text('pytest_plugins = ["mamba_ops.testing"]\n')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = fresh.run(["-m", "pytest", *options, "test_theirs.py"], cwd=tmp_path, env=environment)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "test_theirs.py:6 in forward" in done.stdout
    assert "-> Remove the print" in done.stdout


BASELINE_TESTS = """
import os
import torch

class Breaks(torch.nn.Module):
    def forward(self, x):
        print("here")
        if os.environ.get("WORSE"):
            torch._dynamo.graph_break()
        return x * 2

def test_nothing_new(audit_baseline):
    audit_baseline(Breaks(), torch.ones(4, 8), baseline="audit.json")
"""


def test_what_was_not_compiled_has_nothing_new_and_fails_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    file.write_text(Report("before").to_json())
    with pytest.raises(AssertionError, match="Nothing was compiled"):
        assert_nothing_new(lambda x: x, torch.ones(3), baseline=file)


@pytest.mark.slow
def test_the_baseline_holds_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(BASELINE_TESTS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    options = ["-p", "no:cacheprovider", "-p", "no:mamba_ops", "-p", "mamba_ops_pytest", "-q", "test_theirs.py"]

    def run(**more: str) -> str:
        return fresh.run(["-m", "pytest", *options], cwd=tmp_path, env=environment | more).stdout

    assert "MAMBA_OPS_WRITE_BASELINE=1 writes it" in run()
    assert "1 passed" in run(MAMBA_OPS_WRITE_BASELINE="1")
    assert "1 passed" in run()
    worse = run(WORSE="1")
    assert "1 failed" in worse
    assert "1 new since audit.json" in worse
    assert "-> Remove the call of torch._dynamo.graph_break." in worse
    assert "Remove the print" not in worse
