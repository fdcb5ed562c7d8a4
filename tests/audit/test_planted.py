"""Every planted defect is found where it stands, and nothing is found in its twin."""

import inspect

import pytest
import torch

from compile_tests.planted import CASES
from mamba_ops.audit import audit
from mamba_ops.audit.remedies import RULES

DAILY = (
    "item",
    "deepcopy",
    "hidden mutation",
    "unrolled",
    "three strings",
    "loop over a length",
    "second call of a line",
)
TABLE = [pytest.param(case, id=case.name, marks=() if case.name in DAILY else pytest.mark.slow) for case in CASES]


def run(model, calls, options):
    """Audit a model; where it takes keyword arguments, the last argument of a call is their dict."""
    if any(
        parameter.kind == parameter.VAR_KEYWORD for parameter in inspect.signature(model.forward).parameters.values()
    ):
        (first, *more) = [(args[:-1], args[-1]) for args in calls]
    else:
        (first, *more) = [(args, {}) for args in calls]
    with torch.no_grad():
        return audit(model.eval(), *first[0], more_calls=more, **options, **first[1])


@pytest.mark.parametrize("case", TABLE)
def test_the_defect_is_found_at_its_line(case):
    report = run(case.model(), case.calls(), case.options)
    found = [(f.where.file, f.where.line, f.kind, f.cause) for f in report.findings if f.where]
    assert (*case.where, case.kind, case.cause) in found, report.to_json()
    blamed = {(f.where.file, f.where.line) for f in report.findings if f.where and f.severity != "note"}
    is_note = RULES[case.cause].severity == "note" and case.cause != "rest-of-line"
    assert blamed == (set() if is_note else {case.where})  # and no other line


@pytest.mark.parametrize("case", TABLE)
def test_the_twin_is_clean(case):
    report = run(case.twin(), (case.twin_calls or case.calls)(), case.options)
    assert [f for f in report.findings if f.severity != "note"] == []


def test_there_are_enough():
    assert len(CASES) >= 55
    assert set(DAILY) <= {case.name for case in CASES}
