"""What can be tried without changing code is tried, and its outcome is told; a try that ends badly changes nothing."""

import dataclasses
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
import torch

from mamba_ops.audit import Report
from mamba_ops.audit.outcomes import Counts, Try
from mamba_ops.audit.report import Finding
from mamba_ops.audit.show import closing_lines, lines
from mamba_ops.audit.tries import Tweak, mark, together, tweaks_for
from mamba_ops.commands.audit import tried
from mamba_ops.commands.audit.target import Options, run_here

MODEL = """
import os, signal, time
import torch

class Item(torch.nn.Module):
    def forward(self, x):
        return x * x.sum().item()

class Several(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.LSTM(8, 8)

    def forward(self, x):
        x = self.rnn(x)[0]
        print("here")
        return x[x > 0].sum() + x.sum().item()

class Trap(torch.nn.Module):
    def forward(self, x):
        if torch._dynamo.config.capture_scalar_outputs:
            {trap}
        return x * x.sum().item()

def item(): return Item(), torch.ones(4, 8)
def several(): return Several(), [torch.ones(n, 8) for n in (4, 5, 7)]
def trap(): return Trap(), torch.ones(4, 8)
"""


@pytest.fixture
def tries(tmp_path: Path):
    """Return the report of an audit of a factory in MODEL, with its tries."""

    def audited(factory: str, seconds: float = 300.0, trap: str = "pass", **options) -> Report:
        file = tmp_path / f"{factory}_model.py"
        file.write_text(MODEL.replace("{trap}", trap))
        made = Options(f"{file}:{factory}", **options)
        report = Report(made.target)
        run_here(made, report, lambda step: None)
        tried.try_changes(made, report, seconds, lambda step: None)
        return report

    return audited


def test_a_flag_is_tried_on_the_model_itself(tries):
    report = tries("item")
    [finding] = report.findings
    [outcome] = report.tries  # use_mamba_ops does not bind this model, and is not told of
    assert outcome.findings == outcome.gone == (finding.fingerprint,)
    assert str(outcome.before) == "2 graphs, 1 break"
    assert outcome.after.warm < outcome.after.seconds
    [line] = [line for line in lines(finding, report.tries) if "tried:" in line]
    assert "capture_scalar_outputs = True, tried: 1 graph, 0 breaks; this is gone" in line
    assert Report.from_json(report.to_json()) == report


@pytest.mark.slow
def test_each_finding_has_the_tries_that_fit_it(tries):
    report = tries("several")
    found = {tried.change: tried for tried in report.tries}
    assert all(tried.after for tried in report.tries), report.tries
    assert "torch._dynamo.config.allow_rnn = True" in found
    [best] = [line for line in closing_lines(report) if line.startswith("All that helped, together")]
    for name in ("allow_rnn", "reorderable_logging_functions", "capture_dynamic_output_shape_ops", "dynamic=True"):
        assert name in best  # all but the first were seen once that was gone
    assert ", tried: 1 graph, 0 breaks (without: " in best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trap", "problem"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed, SIGSEGV"),
        ("time.sleep(1000)", "ended after "),
        ("raise RuntimeError('no')", "raised "),
    ],
)
def test_a_try_that_ends_badly_is_told(tries, monkeypatch, trap, problem):
    monkeypatch.setattr(tried, "_LEAST", 5.0)
    report = tries("trap", trap=f"torch._dynamo.disable(lambda: {trap})()" if "raise" not in trap else trap)
    outcomes = {outcome.change: outcome for outcome in report.tries}
    told = outcomes.pop("torch._dynamo.config.capture_scalar_outputs = True")
    assert told.after is None
    assert told.problem.startswith(problem), told
    assert report.finished
    assert report.findings


@pytest.mark.slow
def test_what_our_ops_would_change_ends_the_report(tmp_path):
    """On Transformers' own Mamba-2, whose slow path runs without mamba_ssm."""
    pytest.importorskip("transformers")
    options = Options("transformers:mamba2", shapes=[[1, 32]], layers=1)
    report = Report(options.target)
    run_here(options, report, lambda step: None)
    tried.try_changes(options, report, 600.0, lambda step: None)
    [ours] = [outcome for outcome in report.tries if outcome.ours]
    assert ours.after is not None, ours.problem
    assert ours.after.graphs == 1
    assert ours.after.breaks == 0
    slow = {finding.fingerprint for finding in report.findings if finding.kind == "fallback"}
    assert slow
    assert slow <= set(ours.gone)
    heading, before, after = closing_lines(report)[-3:]
    assert heading == "use_mamba_ops(model), tried on this model:"
    assert before.startswith("  before: ")
    assert after.startswith("  after:  1 graph, 0 breaks")


def test_no_more_seconds_than_allowed(tries):
    begin = time.monotonic()
    report = tries("trap", seconds=0.5)
    assert time.monotonic() - begin < 60
    assert report.tries == []
    assert any(note.startswith("Not tried within 0.5 s (--try-seconds): ") for note in report.notes)


def finding(cause: str, *hints: str, kind: str = "break") -> Finding:
    return Finding(kind, cause, "error", cause, "", "", hints=hints)


def test_hints_of_torch_become_tries() -> None:
    hint = "Set torch._dynamo.config.allow_rnn=True to enable experimental support"
    report = Report("m", findings=[finding("other-break", hint), finding("item", "Set `config.no_such_flag = True`")])
    tweaks = tweaks_for(report, ours=False)
    assert [tweak.config for tweak, _ in tweaks] == [{"allow_rnn": True}, {"capture_scalar_outputs": True}]
    with torch._dynamo.config.patch(allow_rnn=True):
        assert len(tweaks_for(report, ours=False)) == 1  # it is set already


def test_our_ops_come_first_where_a_slow_path_runs() -> None:
    slow = finding("unrolled", kind="fallback")
    report = Report("m", findings=[finding("item"), slow])
    assert tweaks_for(report)[0] == (Tweak(ours=True), (slow.fingerprint,))
    assert tweaks_for(Report("m"))[0] == (Tweak(ours=True), ())
    assert tweaks_for(Report("m"), ours=False) == []


def test_what_helped_is_put_together() -> None:
    flag, sizes, other = Tweak({"allow_rnn": True}), Tweak(dynamic=True), Tweak(mark="dynamic")
    wanted = [(flag, ("a",)), (sizes, ("b",)), (other, ("b",))]
    some = Counts(1, 0, 0, 1.0)
    tries = [Try(str(tweak), names, some, some, names) for tweak, names in wanted]
    assert together(wanted, tries) == flag | sizes
    assert together(wanted, tries[1:]) == sizes
    assert together(wanted, [dataclasses.replace(one, gone=()) for one in tries]) is None


def test_sizes_that_differ_are_marked() -> None:
    calls = [(torch.ones(rows, 8), {"y": torch.ones(3)}) for rows in (1, 4, 5)]
    mark(calls, "dynamic")
    marks = [getattr(call[0], "_dynamo_dynamic_indices", set()) for call in calls]
    assert marks == [set(), {0}, {0}]
    assert not hasattr(calls[1][1]["y"], "_dynamo_dynamic_indices")
