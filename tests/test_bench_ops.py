"""What ops say of their benchmarks, ours and those of other packages."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mamba_ops.commands.bench import command, host, run, show
from mamba_ops.ops._common.bench import LARGE, SMALL, Call, Case
from mamba_ops.registry import NoBackendError, ops
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


def test_what_a_peer_or_an_op_raises_ends_no_measurement_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(op: str, device: torch.device) -> dict[str, Any]:
        if op == "selective_scan":
            raise NoBackendError("triton refuses\nand more", {})
        if op == "causal_conv1d":
            raise KeyboardInterrupt
        return {"op": op, "us": {host.GIVEN: 30.0, host.BARE: 12.0}}

    monkeypatch.setattr(host, "timed", timed)
    names = ["selective_scan", "causal_conv1d_update", "causal_conv1d"]
    rows = host.run(names, CPU, lambda: False, lambda *_: None)
    assert [row["op"] for row in rows] == names[:2]
    assert host.run(names, CPU, lambda: True, lambda *_: None) == []
    text = show.text({**run.run({}, CPU, rates=run.Rates(1e10)), "host": rows})
    assert "2.50" in text
    assert "selective_scan, host, all: NoBackendError: triton refuses\n" in text

    def broken(case: Case, module: Any) -> Call:
        def call(*_: Any) -> torch.Tensor:
            raise TypeError("got an unexpected keyword argument 'slots'")

        return call

    op = ops()["causal_conv1d_update"]
    monkeypatch.setattr(op, "bench_peers", {"broken": broken, "right": lambda case, module: case.ours()})
    monkeypatch.setattr(host, "bare", lambda device: lambda: None)
    assert host.calls_of(op.name, CPU).keys() == {host.GIVEN, host.ALLOCATED, host.BARE, "right"}


def test_the_limit_and_an_interruption_hold_for_the_host_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before is shown, and that not all was."""

    def interrupted(op: str, device: torch.device) -> dict[str, Any]:
        raise KeyboardInterrupt

    console, written = Console(width=80, record=True, file=io.StringIO()), []
    monkeypatch.setattr(run, "cases_of", lambda device: {})
    monkeypatch.setattr(run.Rates, "of", lambda device: run.Rates(1e10))
    monkeypatch.setattr(host, "timed", interrupted)
    for limit in (None, 0.0):
        command._measure(console, [], [], CPU, None, limit, True)
        written.append(console.export_text())
    assert all("The limit, or an interruption, came first" in text for text in written)


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
