"""A report for others: SARIF, GitHub's annotations, an issue without its author's names, and one of several ranks."""

import getpass
import json
from pathlib import Path

import pytest

from mamba_ops.audit.merging import merge
from mamba_ops.audit.outcomes import Counts, Try
from mamba_ops.audit.outputs.github import annotations
from mamba_ops.audit.outputs.issue import cleaned, issue
from mamba_ops.audit.outputs.sarif import sarif
from mamba_ops.audit.report import Finding, Report
from mamba_ops.audit.source_locations import SourceLocation

PAGE = "https://torch.example/gb0124.html"


def finding(file: Path, line: int, *stack: SourceLocation, severity: str = "error", op: str = ".item()") -> Finding:
    where = SourceLocation(str(file), line, "forward", "s = x.item()")
    more = {"breaks": True, "hints": ("Set a flag",), "link": PAGE}
    return Finding("sync", "item", severity, op, "it waits: 100%\nindeed", "do not", where, (*stack, where), **more)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    own, package = tmp_path / "model.py", tmp_path / "lib" / "site-packages" / "theirs" / "layer.py"
    package.parent.mkdir(parents=True)
    for file in (own, package):
        file.write_text("import torch\n\ndef forward(x):\n    s = x.item()\n    return x * s\n")
    call = SourceLocation(str(own), 5, "forward", "return layer(x)")
    report = Report(
        "model.py:make", torch="2.13", findings=[finding(own, 4), finding(package, 4, call, severity="note")]
    )
    names = (report.findings[0].fingerprint,)
    report.tries = [Try("a flag", names, Counts(2, 1, 0, 1.0), Counts(1, 0, 0, 1.0), names)]
    return report


def test_annotations_are_at_lines_of_the_repository(report: Report, tmp_path: Path) -> None:
    error, notice = annotations(report, tmp_path)
    assert error.startswith("::error file=model.py,line=4,title=sync/item%3A .item()::")
    assert "it waits: 100%25%0Aindeed" in error
    assert "a flag, tried: 1 graph, 0 breaks" in error
    assert notice.startswith("::notice file=model.py,line=5,")  # the caller of the package's code
    assert all("\n" not in line for line in (error, notice))
    assert next(annotations(report, tmp_path / "lib")).startswith("::error title=")


def test_sarif_has_places_fingerprints_and_what_is_new(report: Report, tmp_path: Path) -> None:
    before = Report("old", findings=report.findings[1:])
    facts = json.loads(sarif(report, before, tmp_path))
    assert facts["version"] == "2.1.0"
    [run] = facts["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["item"]
    first, second = run["results"]
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "model.py", "uriBaseId": "%SRCROOT%"}
    assert place["region"]["startLine"] == 4
    assert first["partialFingerprints"] == {"mambaOpsAudit/v1": report.findings[0].fingerprint}
    assert [(r["level"], r["baselineState"]) for r in (first, second)] == [("error", "new"), ("note", "unchanged")]
    assert "tried: 1 graph, 0 breaks" in first["message"]["text"]
    assert first["hostedViewerUri"] == PAGE


def test_an_issue_names_neither_its_author_nor_their_secrets(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "ada"
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr(getpass, "getuser", lambda: "ada_l")
    monkeypatch.setenv("MY_API_TOKEN", "correct-horse-battery")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text(
        "# by ada_l\nhub = load(token='abc-def-ghi')\nkey = 'hf_abcdefghijklmnop'\ns = x.item()\n"
        "p = '/data/projects/secret_name/weights.pt'; q = '~'\nz = 'correct-horse-battery'\nurl = 'https://me:pw12@host/x'\n"
    )
    text = issue(report)
    assert "model.py:4 in forward" in text
    assert "s = x.item()  # <- here" in text
    assert "tried: 1 graph, 0 breaks" in text
    assert "- torch 2.13" in text
    assert "- Python 3." in text
    assert PAGE in text
    assert "1 more finding of the same run is left out." in text
    for hidden in (str(tmp_path), "ada_l", "abc-def-ghi", "hf_abc", "secret_name", "correct-horse", "pw12"):
        assert hidden not in text, hidden
    assert cleaned(f"{home}/x.py") == "~/x.py"
    assert cleaned("/opt/me/lib/python3/site-packages/timm/a.py:3") == "timm/a.py:3"
    assert cleaned("y = a / b // c; z = (a/b/c)/d") == "y = a / b // c; z = (a/b/c)/d"


def test_reports_of_ranks_become_one(tmp_path: Path) -> None:
    shared, alone = finding(tmp_path / "a.py", 3), finding(tmp_path / "b.py", 3)
    first = Report("train.py", findings=[shared], notes=["a"], ranks=(1,))
    other = Report("train.py", findings=[finding(tmp_path / "a.py", 3), alone], notes=["a", "b"], ranks=(0,))
    merged = merge([first, other])
    assert merged.ranks == (0, 1)
    assert [(f.where.file[-4:], f.processes, f.count) for f in merged.findings] == [
        ("a.py", ("rank 0", "rank 1"), 1),
        ("b.py", ("rank 0",), 1),
    ]
    assert merged.notes == ["a", "b"]
    assert Report.from_json(merged.to_json()) == merged
    hidden = finding(tmp_path / "a.py", 9)
    hidden.behind = 1
    again = merge([Report("train.py", findings=[alone]), Report("train.py", findings=[shared, hidden])])
    [found] = [f for f in again.findings if f.behind is not None]
    assert again.findings[found.behind - 1].where == shared.where
    with pytest.raises(ValueError, match="expected each rank once"):
        merge([first, first])
    with pytest.raises(ValueError, match="expected one at least"):
        merge([])
