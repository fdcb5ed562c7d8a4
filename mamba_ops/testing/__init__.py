"""For tests: `check_op` holds an op to its contract, `assert_one_graph` (the pytest fixture `graph_audit`) a model.

`assert_nothing_new` (the fixture `audit_baseline`) holds a model to an older report, as `audit --compare` does.
pytest finds the fixtures by itself where mamba-ops is installed; elsewhere `pytest_plugins = ["mamba_ops.testing"]` in
conftest.py brings it.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamba_ops.ops._common.bench import Case as Case
from mamba_ops.ops._common.bench import NotTaken as NotTaken
from mamba_ops.ops._common.random_inputs import RandomInputs as RandomInputs
from mamba_ops.testing.judge import assert_within_budget as assert_within_budget
from mamba_ops.testing.judge import error_budget as error_budget
from mamba_ops.testing.op_checks import Checked as Checked
from mamba_ops.testing.op_checks import check_op as check_op

if TYPE_CHECKING:
    from mamba_ops.audit import Report


with contextlib.suppress(ModuleNotFoundError):  # without pytest no test asks for the fixtures
    import pytest

    @pytest.fixture
    def graph_audit() -> "Callable[..., Report]":
        """Return `assert_one_graph`."""
        return assert_one_graph

    @pytest.fixture
    def audit_baseline() -> "Callable[..., Report]":
        """Return `assert_nothing_new`."""
        return assert_nothing_new


def assert_nothing_new(
    model: Callable[..., Any],
    *inputs: Any,
    baseline: str | Path,
    fail_on: Sequence[str] = ("new",),
    **kwargs: Any,
) -> "Report":
    """Fail, with what to change, on findings that an older report does not hold: `--compare FILE --fail-on new`.

    Args:
        model, inputs, kwargs: what is called; `shapes`, `train` and the other options of `mamba_ops.audit.audit` too.
        baseline: the file of the older report. With MAMBA_OPS_WRITE_BASELINE=1 it is written, and nothing fails.
        fail_on: as for the command; "new" alone stands for every new finding above a note.

    Raises:
        AssertionError: there are such findings, which its message holds; or nothing was compiled.
        FileNotFoundError: there is no baseline yet.
        ValueError: the baseline is no report of this version.
    """
    from mamba_ops.audit import Report, audit
    from mamba_ops.audit.show import lines

    file = Path(baseline)
    if os.environ.get("MAMBA_OPS_WRITE_BASELINE") == "1":
        report = audit(model, *inputs, **kwargs)
        file.write_text(report.to_json() + "\n", encoding="utf-8")
        return report
    if not file.is_file():
        raise FileNotFoundError(
            f"assert_nothing_new: baseline: got {file}, expected a report of an earlier run; "
            "MAMBA_OPS_WRITE_BASELINE=1 writes it"
        )
    before = Report.from_json(file.read_text(encoding="utf-8"))
    report = audit(model, *inputs, **kwargs)
    found = report.failing(fail_on, before)
    if report.incomplete and not found:
        raise AssertionError(f"{report.target}: {report.verdict}")
    if found:
        text = [f"{report.target}: {len(found)} new since {file.name}; MAMBA_OPS_WRITE_BASELINE=1 accepts them."]
        raise AssertionError("\n".join(text + ["\n".join(["", *lines(finding)]) for finding in found]))
    return report


def assert_one_graph(
    model: Callable[..., Any],
    *inputs: Any,
    shapes: Sequence[Sequence[int]] | None = None,
    allow: Sequence[str] = ("size-one",),
    **kwargs: Any,
) -> "Report":
    """Fail, with what to change, unless every call of a model is one graph.

    torch compiles once more when a size changes for the first time, and once for size 1. Both are let pass.

    Args:
        model, inputs, kwargs: what is called; `train`, `device` and the other options of `mamba_ops.audit.audit` too.
        shapes: leading sizes to call it with, such as `[(1, 128), (4, 512)]`.
        allow: causes that may be found all the same.

    Raises:
        AssertionError: the model breaks or recompiles; its message holds the findings.
    """
    from mamba_ops.audit import audit
    from mamba_ops.audit.show import lines

    report = audit(model, *inputs, shapes=shapes, **kwargs)
    found = [f for f in report.failing(("break", "recompile", "kernel", "sync", "copy")) if f.cause not in allow]
    first = [graph for graph in report.graphs if graph.call == 0]
    if found or len(first) != 1:
        text = [f"{report.target}: got {len(first)} graphs in the first call, expected 1. {report.verdict}"]
        text += ["\n".join(["", *lines(finding)]) for finding in found]
        raise AssertionError("\n".join(text))
    return report
