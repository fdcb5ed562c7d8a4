"""Recompiles: the guards that failed of the version that fits best, what became dynamic, and totals that agree."""

import functools
import json

import pytest
import torch

from compile_tests.planted import breaks, guards, recompiles
from mamba_ops.audit import Report, audit
from mamba_ops.audit.recompiles import story, summary
from mamba_ops.audit.show import lines


def audited(model, *calls) -> Report:
    """Audit a model with calls, each a tuple of arguments, or arguments and a dict of keyword arguments."""
    made = [(call[:-1], call[-1]) if isinstance(call[-1], dict) else (call, {}) for call in calls]
    with torch.no_grad():
        report = audit(model.eval(), *made[0][0], more_calls=made[1:], **made[0][1])
    assert len(report.recompiles) == sum(row.recompiles for row in report.calls)
    assert len(report.recompiles) == sum(f.count for f in report.findings if f.kind == "recompile")
    return report


def test_the_version_that_fits_best_is_compared():
    """Version 1 was used last, and is of another form of call; version 0 fits but for one size."""
    scale = {"scale": torch.tensor(2.0)}
    report = audited(recompiles.Keywords(), (torch.ones(5, 8), {}), (torch.ones(1, 8), scale), (torch.ones(7, 8), {}))
    form, size = report.recompiles
    assert [(value.subject, value.before, value.now) for value in size.changed] == [("x.shape[0]", "5", "7")]
    assert size.changed[0].dynamic
    assert [(value.subject, value.before, value.now) for value in form.changed] == [
        ("kwargs", "empty", "scale"),
        ("x.shape[0]", "5", "1"),
    ]
    [found] = [finding for finding in report.findings if finding.cause == "size"]
    assert found.values == ("5", "1", "7")
    assert found.message == "x.shape[0]: 5 -> 7"


@pytest.mark.slow
def test_a_number_becomes_dynamic_at_its_second_value():
    report = audited(recompiles.Repeats(), *((breaks.x(), n) for n in (3, 4, 5, 6, 7, 8, 9)))
    [found] = report.findings
    assert (found.cause, found.severity, found.count, found.values) == ("number", "note", 1, ("3", "4"))
    [row] = story(report)
    assert (row.values, row.dynamic, row.versions) == (["3", "4"], 2, 2)
    assert report.verdict == "Nothing to change: 2 graphs, no break."


def test_all_values_of_a_text_are_named_and_every_view_has_the_same_totals():
    pytest.importorskip("jinja2")
    from mamba_ops.audit.html import page

    report = audited(guards.Text(), *((breaks.x(), mode) for mode in ("relu", "tanh", "none")))
    [found] = report.findings
    assert found.values == ("'relu'", "'tanh'", "'none'")
    assert "Values seen: 'relu' -> 'tanh' -> 'none'" in lines(found)
    assert "one compiled function for each value" in found.remedy
    assert report.verdict == "Found: 1 recompile (seen 2 times)."
    [row] = story(report)
    assert row.cells[2:6] == ["'relu' -> 'tanh' -> 'none'", "2, 3", "no", "3 of 8"]
    assert row.seconds == found.seconds == pytest.approx(sum(made.seconds for made in report.recompiles), abs=0.01)
    assert found.seconds > 0
    facts = json.loads(report.to_json())
    assert facts["totals"] == [{"kind": "recompile", "findings": 1, "times": 2, "notes": 0, "seconds": found.seconds}]
    assert Report.from_json(report.to_json()) == report
    text = page(report)
    assert "1 recompile (seen 2 times)" in text
    assert f"Recompiles: {summary(report)}" in text
    assert summary(report) == f"2 recompiles, {row.seconds:.1f} s"


@pytest.mark.slow
def test_sizes_of_different_dimensions_are_kept_apart():
    report = audited(recompiles.AnyRank(), *((torch.randn(*shape),) for shape in ((2, 4, 8), (2, 5, 8), (3, 5, 8))))
    assert {(f.cause, f.op, f.count) for f in report.findings} == {("size", "x.shape[1]", 1), ("size", "x.shape[0]", 1)}


@pytest.mark.slow
def test_two_arguments_of_one_function_are_two_findings():
    shapes = ((4, 8), (4, 8)), ((5, 8), (4, 8)), ((5, 8), (5, 8))
    model = recompiles.SameLengthTwin()
    report = audited(model, *((torch.randn(a), torch.randn(b)) for a, b in shapes))
    assert {f.op for f in report.findings} == {"x.shape[0]", "other.shape[0]"}


def test_a_recompile_that_follows_from_a_break_says_which_to_mend_first():
    report = audited(recompiles.InHelper(), (breaks.x(),))
    [broken] = [finding for finding in report.findings if finding.breaks]
    [found] = [finding for finding in report.findings if finding.kind == "recompile"]
    assert (found.cause, found.op, found.message) == ("rank", "value", "value.dim(): 1 -> 2")
    assert found.where.function == "widened"
    assert found.where.source.startswith("def widened(")  # not the model's forward
    assert found.mend_first == f"recompiles.py:{broken.where.line} in widened (torch._dynamo.graph_break)"
    assert found.remedy.startswith(f"Mend the graph break at {found.mend_first}, first")


@pytest.mark.slow
def test_a_size_that_changes_between_calls_does_not_follow_from_a_break():
    report = audited(breaks.Explicit(), *((torch.randn(n, 8),) for n in (4, 5)))
    assert [f.mend_first for f in report.findings if f.kind == "recompile"]
    assert not any(f.mend_first for f in report.findings)


def test_the_op_is_the_one_at_the_break_not_the_first_of_its_line():
    report = audited(recompiles.SecondCall(), (breaks.x(),))
    assert [(f.cause, f.op) for f in report.findings] == [("disable", "broken")]


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(breaks.Base):
    @decorated
    def forward(self, x):
        return self.proj(x)


@pytest.mark.slow
def test_a_decorated_forward_is_named_itself():
    report = audited(Decorated(), (torch.randn(4, 8),), (torch.randn(5, 8),))
    [made] = report.recompiles
    assert made.function.endswith("Decorated.forward")
    assert made.where.source == "def forward(self, x):"


def test_findings_stand_in_the_order_of_the_seconds_that_they_cost():
    report = audited(recompiles.OverLength(), *((torch.randn(n, 8),) for n in (4, 5)))
    seconds = [finding.seconds for finding in report.findings]
    assert seconds == sorted(seconds, reverse=True)
    assert [f.cause for f in report.findings] == ["size-fixed"]  # told at the second length
    assert seconds[0] > 0


class Options:
    """Holds a number that the model reads."""

    def __init__(self, number):
        self.number = number


def test_numbers_that_became_dynamic_are_notes_wherever_they_are_held():
    class Reads(breaks.Base):
        def forward(self, x, options):
            return self.proj(x) * options.number

    report = audited(Reads(), *((torch.ones(4, 8), Options(number)) for number in (2, 5)))
    assert [(f.cause, f.op, f.severity) for f in report.findings] == [("number", "options.number", "note")]


def test_values_from_before_a_break_are_named_as_such():
    class Breaks(breaks.Base):
        def forward(self, x):
            return x * x.sum().item()

    report = audited(Breaks(), (torch.randn(4, 8),), (torch.randn(5, 8),))
    rest = next(f for f in report.findings if "before the break" in f.op)
    assert rest.op == "(a value from before the break).shape[0]"
    assert rest.mend_first is not None
    assert "dynamic=True: " in rest.remedy
    assert "mark_dynamic" not in rest.remedy
    assert not any("___stack" in text for f in report.findings for text in (f.op, f.message, f.remedy))
