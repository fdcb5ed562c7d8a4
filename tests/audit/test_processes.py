"""What other processes compile is in the report, or its first line says that it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from mamba_ops.audit import watch
from mamba_ops.audit.outcomes import CallRow, ChangedValue, Event, Graph, Recompile
from mamba_ops.audit.processes import add_process
from mamba_ops.audit.report import Report
from mamba_ops.audit.source_locations import SourceLocation
from mamba_ops.audit.timeline import bars
from tests.conftest import ACCELERATOR

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, subprocess, sys
import torch
import torch.multiprocessing as mp

class Data(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): return torch.compile(f, backend="aot_eager")(torch.ones(3) * i)

def f(x):
    if x.sum() > 0:  # planted
        return x
    return -x

def work(rank):
    torch.compile(f, backend="aot_eager")(torch.ones(3))

def twin(rank):
    torch.compile(lambda x: x * 2, backend="aot_eager")(torch.ones(3))

def spawn(): mp.spawn(work, (), 2)
def clean(): mp.spawn(twin, (), 1)
def workers(): list(torch.utils.data.DataLoader(Data(), num_workers=1, multiprocessing_context="fork"))
def torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "rank"]
    subprocess.run(command, check=True)
def isolated(): subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
def other(): subprocess.run(["sh", "-c", "true"], check=True)
def rank(): work(int(os.environ["RANK"]))

if __name__ == "__main__":
    globals()[sys.argv[1]]()
"""


def run(tmp_path: Path, what: str) -> tuple[int, str, Report]:
    script, answer = tmp_path / "script.py", tmp_path / "report.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mamba_ops", "audit", "--run", str(script), what, "--fail-on", "break"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--json", str(answer)], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert answer.exists(), done.stderr
    return done.returncode, done.stdout, Report.from_json(answer.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("spawn", {"SpawnProcess-1", "SpawnProcess-2"}),
        ("workers", {"ForkProcess-1"}),
        ("torchrun", {"rank 0", "rank 1"}),
    ],
)
def test_breaks_of_children_are_found_at_their_line(tmp_path, what, names):
    status, said, report = run(tmp_path, what)
    assert status == 1, said
    [finding] = report.findings
    assert "# planted" in finding.where.source
    assert set(finding.processes) == names
    assert finding.count == len(names)
    assert [row.shapes for row in report.calls][1:] == sorted(names)
    assert report.unwatched == 0


@pytest.mark.slow
def test_children_without_a_fault_are_clean(tmp_path):
    status, said, report = run(tmp_path, "clean")
    assert (status, report.findings, report.unwatched) == (0, [], 0), said
    assert "Nothing to change: 1 graph" in said


@pytest.mark.slow
@pytest.mark.parametrize(("what", "status"), [("isolated", 3), ("other", 3)])
def test_nothing_compiled_is_a_status_of_its_own(tmp_path, what, status):
    got, _, report = run(tmp_path, what)
    assert got == status
    first = report.verdict
    assert first == ("1 process was not watched. " if what == "isolated" else "") + "Nothing was compiled."
    assert not report.clean


def made_by(process: str) -> Report:
    where = SourceLocation("/train.py", 3, "f", "x")
    report = Report(
        process, calls=[CallRow(process, seconds=3.0)], graphs=[Graph(0, "0/1", 2)], compile_seconds={"0/1": 2.0}
    )
    report.recompiles = [Recompile(0, "0/1", "f", where, (ChangedValue("n"),), 1, 8, 2.0)]
    report.events = [Event("graph", 0, "0/1", 0.5, "2 ops")]
    return report


def test_what_another_process_made_has_a_call_and_names_of_its_own():
    report = made_by("watched")
    add_process(report, made_by("rank 1"))
    for made in (report.graphs, report.recompiles, report.events):
        assert [(one.call, one.compile_id) for one in made] == [(0, "0/1"), (1, "0/1 in rank 1")]
    assert [[part["kind"] for part in bar.parts] for bar in bars(report)] == [["again"], ["again"]]


def broken(x):
    if x.sum() > 0:  # planted
        return x
    return -x


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.skipif(ACCELERATOR is not None, reason="a forked process cannot use its parent's GPU")
def test_a_forked_process_is_in_the_report_and_one_that_hides_is_counted():
    environment = dict(os.environ)
    with watch() as report:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
        if (child := os.fork()) == 0:
            torch.compile(broken, backend="eager")(torch.ones(3))
            os._exit(0)
        os.waitpid(child, 0)
        subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)
        subprocess.run([sys.executable, "-S", "-c", "pass"], check=True, env={})
    [finding] = [finding for finding in report.findings if finding.breaks]
    assert "# planted" in finding.where.source
    assert finding.processes == (f"process {child}",)
    assert report.verdict == "2 processes were not watched. Found: 1 graph break."
    assert dict(os.environ) == environment
