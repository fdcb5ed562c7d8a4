"""Reports that several files read, made once; their tests are of the xdist group "deep"."""

import pytest

from compile_tests.planted import CASES
from mamba_ops.audit import Report, audit


@pytest.fixture(scope="session")
def deep() -> Report:
    """Of a model of 48 layers, each of which breaks the graph."""
    [case] = [case for case in CASES if case.name == "deep"]
    return audit(case.model().eval(), *case.calls()[0])


@pytest.fixture(scope="session")
def clean() -> Report:
    """Of the same model without the breaks."""
    [case] = [case for case in CASES if case.name == "deep"]
    return audit(case.twin().eval(), *case.calls()[0])
