"""A report as SARIF 2.1.0, which code hosts and editors read (OASIS, Static Analysis Results Interchange Format)."""

import json
from pathlib import Path
from typing import Any

from mamba_ops.audit.outputs.places import place
from mamba_ops.audit.remedies import RULES
from mamba_ops.audit.report import Finding, Report, compare
from mamba_ops.audit.show import lines
from mamba_ops.audit.source_locations import SourceLocation

_LEVELS = {"error": "error", "warning": "warning", "note": "note"}


def sarif(report: Report, before: Report | None = None, root: Path | None = None) -> str:
    """Return the JSON.

    Args:
        report: what was found.
        before: an older report; each result then says whether it is new.
        root: the folder of the repository, which paths are relative to; the current folder by default.
    """
    root = root or Path.cwd()
    new = {id(change.finding) for change in compare(report, before) if change.what == "new"} if before else set()
    causes = list(dict.fromkeys(finding.cause for finding in report.findings))
    results = []
    for finding in report.findings:
        result = _result(finding, report, causes, root)
        if before is not None:
            result["baselineState"] = "new" if id(finding) in new else "unchanged"
        results.append(result)
    driver = {"name": "mamba-ops audit", "rules": [_rule(cause) for cause in causes]}
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "columnKind": "unicodeCodePoints",
        "results": results,
        "properties": {"verdict": report.verdict, "device": report.device, "torch": report.torch},
    }
    if not report.finished:
        run["invocations"] = [{"executionSuccessful": False}]
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json.dumps({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=1)


def _rule(cause: str) -> dict[str, Any]:
    rule = RULES[cause]
    return {
        "id": cause,
        "shortDescription": {"text": f"{rule.kind}/{cause}"},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
    }


def _result(finding: Finding, report: Report, causes: list[str], root: Path) -> dict[str, Any]:
    heading, *rest = lines(finding, report.tries)
    result: dict[str, Any] = {
        "ruleId": finding.cause,
        "ruleIndex": causes.index(finding.cause),
        "level": _LEVELS[finding.severity],
        "message": {"text": "\n".join([heading, *rest])},
        "partialFingerprints": {"mambaOpsAudit/v1": finding.fingerprint},
        "occurrenceCount": finding.count,
    }
    if (where := place(finding, root)) is not None:
        result["locations"] = [_location(where)]
    if finding.link:
        result["hostedViewerUri"] = finding.link
    return result


def _location(where: SourceLocation) -> dict[str, Any]:
    region = {"startLine": where.line, "snippet": {"text": where.source}}
    artifact = {"uri": where.file, "uriBaseId": "%SRCROOT%"}
    return {"physicalLocation": {"artifactLocation": artifact, "region": region}}
