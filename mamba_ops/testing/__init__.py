"""For tests: `check_op` holds an op to its contract, `assert_one_graph` (the pytest fixture `graph_audit`) a model.

pytest finds the fixture by itself where mamba-ops is installed; elsewhere `pytest_plugins = ["mamba_ops.testing"]` in
conftest.py brings it.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mamba_ops.ops._common.random_inputs import RandomInputs as RandomInputs
from mamba_ops.testing.judge import assert_within_budget as assert_within_budget
from mamba_ops.testing.judge import error_budget as error_budget
from mamba_ops.testing.op_checks import Checked as Checked
from mamba_ops.testing.op_checks import check_op as check_op

if TYPE_CHECKING:
    from mamba_ops.audit import Report

with contextlib.suppress(ModuleNotFoundError):  # without pytest no test asks for the fixture
    import pytest

    @pytest.fixture
    def graph_audit() -> "Callable[..., Report]":
        """Return `assert_one_graph`."""
        return assert_one_graph


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
