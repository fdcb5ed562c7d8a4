"""A report as one page that needs no server and no network."""

from importlib import resources
from typing import Any

from mamba_ops.audit.report import KINDS, Finding, Report, compare, counted
from mamba_ops.audit.show import caller, cells, describe, excerpt, grouped, headings, short

_CELLS = 60  # of a strip, at most


def page(report: Report, before: Report | None = None) -> str:
    """Return the HTML; `before` is an older report to compare with.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    text = resources.files("mamba_ops.audit").joinpath("report.html.j2").read_text(encoding="utf-8")
    changes = [(change.what, describe(change)) for change in compare(report, before)] if before else None
    findings = [_shown(f"f{number}", finding) for number, finding in enumerate(report.findings, 1)]
    return environment.from_string(text).render(
        report=report,
        findings=findings,
        strips=strips(report),
        changes=changes,
        kinds=_kinds(report),
        headings=headings(report),
        rows=[(row.shapes, cells(row)[: len(headings(report))]) for row in report.calls],
    )


def _kinds(report: Report) -> list[tuple[str, str]]:
    shown = []
    for kind in KINDS:
        notes = [finding.severity == "note" for finding in report.findings if finding.kind == kind]
        words = [counted(kind, notes.count(False))] if False in notes else []
        words += [f"{sum(notes)} note{'s' * (sum(notes) > 1)}"] if True in notes else []
        if words:
            shown.append((kind, " and ".join(words) if len(words) > 1 or False in notes else f"{words[0]} ({kind})"))
    return shown


def _shown(name: str, finding: Finding) -> dict[str, Any]:
    return {
        "id": name,
        "finding": finding,
        "layers": grouped(finding.layers),
        "source": excerpt(finding.where) if finding.where else [],
        "caller": caller(finding),
    }


def strips(report: Report) -> list[dict[str, Any]]:
    """Return the picture's rows: for each layer, its segments of the graphs of the first call, and the breaks in it."""
    breaks = [(f"f{n}", finding) for n, finding in enumerate(report.findings, 1) if finding.breaks]
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, graph in enumerate(graph for graph in report.graphs if graph.call == 0):
        for at, segment in enumerate(graph.segments):
            kind = "split" if segment.splitting else "segment"
            name = f"graph {number + 1}" + (f".{at + 1}" if len(graph.segments) > 1 else "")
            title = f"{name}: {segment.splitting or f'{segment.ops} ops in all'}"
            colour = (number * 3 + at) % 5
            cell = {
                "kind": kind,
                "label": (segment.splitting or name).rpartition("::")[2],
                "title": title,
                "link": None,
                "colour": colour,
            }
            for layer in dict.fromkeys(_layer(name, report) for name in segment.layers) or [""]:
                rows.setdefault(layer, []).append(cell)
    for link, finding in breaks:
        for layer in dict.fromkeys(_layer(name, report) for name in finding.layers) or [""]:
            title = f"{finding.cause}: {finding.op}, {short(finding.where) if finding.where else 'nowhere'}"
            cell = {"kind": "break", "label": finding.cause, "title": title, "link": link, "colour": 0}
            rows.setdefault(layer, []).append(cell)
    shown: list[dict[str, Any]] = []
    for name in sorted(rows, key=_order):
        cells = rows[name]
        if shown and cells == shown[-1]["all"] and _order(name)[:-1] == _order(shown[-1]["names"][-1])[:-1]:
            shown[-1]["names"].append(name)
        else:
            shown.append({"names": [name], "all": cells, "cells": cells[:_CELLS], "more": len(cells) - _CELLS})
    for row in shown:
        first, last = row["names"][0], row["names"][-1]
        row["layer"] = (first or "the model") if first == last else f"{first} to {last.rpartition('.')[2]}"
    return shown


def _order(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which layers are ordered by number."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _layer(name: str, report: Report) -> str:
    """Return the layer that a module is in: the name up to its first number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1]) if at is not None else ""
