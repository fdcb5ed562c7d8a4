"""What ops say of their benchmarks, ours and those of other packages."""

import json
import os
from pathlib import Path

import pytest
import torch

from mamba_ops.commands.bench import host, run, show
from mamba_ops.ops._common.bench import LARGE, SMALL
from mamba_ops.registry import ops
from tests import fresh

CPU = torch.device("cpu")
HOSTED = [name for name, op in ops().items() if op.host_call]


def test_every_op_that_is_no_layer_has_cases_of_both_scales() -> None:
    mine = {name: op for name, op in ops().items() if op.patterns and not name.endswith("_mixing")}
    assert run.cases_of(CPU).keys() == run.cases_of(torch.device("cuda")).keys() == mine.keys()
    assert len(mine) > 10
    for op in mine.values():
        assert all(len([*op.facets["bench_cases"](scale)]) >= 2 for scale in (SMALL, LARGE))
    assert {name for name, op in mine.items() if not op.composed} == set(HOSTED)


@pytest.mark.parametrize("op", HOSTED)
def test_the_host_is_timed_with_calls_that_are_taken(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "bare", lambda device: lambda: None)
    calls = host.calls_of(op, CPU)
    assert calls.keys() >= {host.GIVEN, host.ALLOCATED, host.BARE}
    for call in calls.values():
        call()
    row = {"op": op, "us": {host.GIVEN: 30.0, host.BARE: 12.0, "vLLM": 24.0}}
    text = show.text({**run.run({}, CPU, rates=run.Rates(1e10)), "host": [row]})
    assert op in text
    assert "2.50" in text
    assert "2.00" in text


TALLY = """
import torch
from torch import Tensor
from mamba_ops.registry import Namespace, Sample, require_out
from mamba_ops.testing import Case, NotTaken, RandomInputs

tallies = Namespace("tallies")

@tallies.op(mutates=("total", "out"))
def tally(total: Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    \"""Add x to total, and write three times the sum.\"""
    total += x
    return require_out(out).copy_(3 * total)

@tally.allocate_output
def _output(x: Tensor) -> Tensor:
    return torch.empty_like(x)

@tally.call_patterns("rows")
def _call(random: RandomInputs, pattern: str) -> Sample:
    return Sample(pattern, (random.cache(8), random.placed((random.rows, 8), random.dtype)))

@tally.bench_cases
def _cases(scale: str):
    def build(device: torch.device) -> Case:
        x = torch.randn(5, 8, device=device)
        return Case(tally, f"of {scale} sums", {"x": x}, {"total": torch.ones(5, 8, device=device)}, x.clone())

    yield build

tally.bench_host("rows", 4, 1)

@tally.bench_peer("math")
def _math(case: Case, module):
    assert module("math").pi > 3
    return lambda caches, _: 3 * caches["total"].add_(case.arguments["x"])

@tally.bench_peer("absent")
def _absent(case: Case, module):
    return module("no_such_module_anywhere").tally

@tally.bench_peer("picky")
def _picky(case: Case, module):
    raise NotTaken("takes no sums")
"""


def test_an_op_of_another_package_is_timed_too(tmp_path: Path) -> None:
    """A package that is found by its entry point, with an op that has neither slots nor Mamba's arguments."""
    (tmp_path / "tally.py").write_text(TALLY)
    info = tmp_path / "tally-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tally\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mamba_ops.backends]\ntally = tally\n")
    program = """
from mamba_ops.commands.bench import host, run, show
from mamba_ops.commands.cli import app
import torch
show.plot = lambda found, path: None  # matplotlib takes seconds
run.Rates.of = lambda device: run.Rates(1e10)
host.bare = lambda device: lambda: None
app(["bench", "--device", "cpu", "--ops", "tally", "--output", "figures"], standalone_mode=False)
for call in host.calls_of("tally", torch.device("cpu")).values():
    call()
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    done = fresh.run(["-c", program], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures" / "bench.json").read_text())
    [row] = figures["rows"]
    assert (row["op"], row["case"], row["bytes"]) == ("tally", "of small sums", 4 * 40 * 4)
    statuses = {each["name"]: each["status"] for each in row["contestants"]}
    assert statuses == {"torch": "timed", "math": "timed", "absent": "absent", "picky": "refused"}
    assert "tally" not in figures["without_case"]
    assert "of small sums" in done.stdout
