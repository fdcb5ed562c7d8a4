"""Audits held to torch's own trace: what either has alone is listed; of models of PyPI packages, nothing is."""

import pytest

pytest.importorskip("typer")
from compile_tests import against_torch
from compile_tests.against_torch import compare, compare_with_torch
from compile_tests.pypi_targets import installed
from mamba_ops.audit.outcomes import Recompile
from mamba_ops.audit.report import Finding, Report
from mamba_ops.audit.source_locations import SourceLocation


def report(*lines: int, recompiles: tuple[str, ...] = ()) -> dict[str, object]:
    def finding(line: int, behind: int | None = None) -> Finding:
        where = SourceLocation("/m.py", line)
        return Finding("break", "print", "error", "print", "", "", where, breaks=True, behind=behind)

    findings = [*map(finding, lines), finding(100, 1)]  # torch does not meet the last one
    made = [Recompile(1, name, "f", SourceLocation("/m.py", 1), (), 1, 8) for name in recompiles]
    return {"seconds": 1.1, "seconds_behind": 0.0, "report": Report("m", findings=findings, recompiles=made).to_json()}


def test_what_either_has_alone_is_listed():
    torch_has = {
        "seconds": 1.0,
        "breaks": [["/m.py:1", "/m.py:5"], ["/m.py:2", "/m.py:6"], ["/m.py:7"]],
        "recompiles": ["0/1", "1/1"],
    }
    found = compare("m", torch_has, report(5, 2, 9, recompiles=("0/1", "0/2")))
    assert (found.breaks, found.missed, found.false) == (3, ["/m.py:7"], ["/m.py:9"])
    assert found.elsewhere == ["/m.py:6 -> /m.py:2"]
    assert (found.recompiles, found.recompiles_missed, found.recompiles_false) == (2, ["1/1"], ["0/2"])
    assert not found.agrees
    assert compare("m", {**torch_has, "breaks": [], "recompiles": []}, report(3)).false == ["/m.py:3"]
    assert compare("m", {**torch_has, "breaks": torch_has["breaks"][:1]}, report(5, recompiles=("0/1", "1/1"))).agrees


def test_the_records_of_torch_are_read():
    told = 'Graph break in user code at /m.py:4\nUser code traceback:\n  File "/n.py", line 3, in f\n    y\n'
    records = [
        ({"artifact": {"name": "dynamo_graph_break_reason"}}, told + "\nTraceback (most recent call last)\n"),
        ({"artifact": {"name": "recompile_reasons"}, "frame_id": 2, "frame_compile_id": 1}, "x"),
        ({"compilation_metrics": {}}, ""),
    ]
    assert against_torch._read(records) == {"breaks": [["/n.py:3", "/m.py:4"]], "recompiles": ["2/1"]}


@pytest.mark.slow
@pytest.mark.parametrize("target", installed() or ["none"])
def test_models_of_packages(target):
    if target == "none":
        pytest.skip("needs packages of compile_tests/pypi_targets.py, such as timm")
    found = compare_with_torch(target)
    assert found.agrees, "\n".join(against_torch.show(found))
