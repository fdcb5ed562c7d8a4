"""Every planted defect is found where it stands, and nothing is found in its twin."""

import pytest
import torch

from compile_tests.planted import CASES
from mamba_ops.audit import audit

NAMES = [case.name for case in CASES]


def run(model, calls, options):
    (first, *more) = calls
    with torch.no_grad():
        return audit(model.eval(), *first, calls=more, **options)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_defect_is_found_at_its_line(case):
    report = run(case.model(), case.calls(), case.options)
    found = [(f.where.file, f.where.line, f.kind, f.cause) for f in report.findings if f.where]
    assert (*case.where, case.kind, case.cause) in found, report.to_json()
    blamed = {(f.where.file, f.where.line) for f in report.findings if f.where and f.severity != "note"}
    assert blamed == {case.where}  # and no other line


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_twin_is_clean(case):
    report = run(case.twin(), (case.twin_calls or case.calls)(), case.options)
    assert [f for f in report.findings if f.severity != "note"] == []


def test_there_are_enough():
    assert len(CASES) >= 25
