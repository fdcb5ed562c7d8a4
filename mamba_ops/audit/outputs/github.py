"""A report as annotations of GitHub's: lines that its runner reads from a step's output and shows in the diff.

Source of the format: GitHub's documentation of workflow commands (`::error file=...,line=...,title=...::message`).
"""

from collections.abc import Iterator
from pathlib import Path

from mamba_ops.audit.outputs.places import place
from mamba_ops.audit.report import Report
from mamba_ops.audit.show import lines

_LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def annotations(report: Report, root: Path | None = None) -> Iterator[str]:
    """Yield one line for each finding; paths are relative to `root`, the current folder by default.

    A finding that has no line in that folder is an annotation of the run as a whole.
    """
    for finding in report.findings:
        _, *rest = lines(finding, report.tries)
        where = place(finding, root or Path.cwd())
        facts = {"title": f"{finding.kind}/{finding.cause}: {finding.op}"}
        if where is not None:
            facts = {"file": where.file, "line": str(where.line), **facts}
        properties = ",".join(f"{name}={_property(value)}" for name, value in facts.items())
        yield f"::{_LEVELS[finding.severity]} {properties}::{_text(chr(10).join(rest))}"


def _text(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _text(value).replace(":", "%3A").replace(",", "%2C")
