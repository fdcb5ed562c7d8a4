"""A report as one page that needs no server and no network."""

import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mamba_ops.audit.outcomes import Graph
from mamba_ops.audit.outputs.issue import issue
from mamba_ops.audit.recompiles import HEADINGS, story, summary
from mamba_ops.audit.report import Finding, Report, compare
from mamba_ops.audit.show import cells, closing_lines, describe, excerpt, grouped, headings, short, told, tried_line
from mamba_ops.audit.timeline import bars, in_call_order

_CELLS = 60  # of a strip, at most


def page(report: Report, before: Report | None = None, trace: str | None = None) -> str:
    """Return the HTML.

    Args:
        report: what was found.
        before: an older report to compare with.
        trace: the address of tlparse's page about the same run, relative to this one.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    environment.filters["shortened"] = lambda text: text.replace(f"{Path.cwd()}{os.sep}", "")
    text = resources.files("mamba_ops.audit").joinpath("report.html.j2").read_text(encoding="utf-8")
    changes = [(change.what, describe(change)) for change in compare(report, before)] if before else None
    names = {finding.fingerprint: f"f{number}" for number, finding in enumerate(report.findings, 1)}
    findings = [_shown(f"f{number}", finding, report) for number, finding in enumerate(report.findings, 1)]
    return environment.from_string(text).render(
        report=report,
        findings=findings,
        strips=strips(report),
        order=[(event, names.get(event.fingerprint)) for event in in_call_order(report)],
        bars=bars(report),
        closing=closing_lines(report),
        issue=issue(report) if report.findings else None,
        trace=trace,
        changes=changes,
        kinds=_kinds(report),
        headings=headings(report),
        story_headings=HEADINGS,
        story=[row.cells for row in story(report)],
        story_summary=summary(report),
        rows=[(row.shapes, cells(row)[: len(headings(report))]) for row in report.calls],
    )


def _kinds(report: Report) -> list[tuple[str, str]]:
    shown = []
    for total in report.totals:
        words = [total.words] if total.findings else []
        words += [f"{total.notes} note{'s' * (total.notes > 1)}"] if total.notes else []
        shown.append((total.kind, " and ".join(words) if total.findings else f"{words[0]} ({total.kind})"))
    return shown


def _shown(name: str, finding: Finding, report: Report) -> dict[str, Any]:
    return {
        "id": name,
        "finding": finding,
        "layers": grouped(finding.layers),
        "source": excerpt(finding.where) if finding.where else [],
        "told": told(finding),
        "chain": [location for location in reversed(finding.stack) if location != finding.where],
        "tries": [tried_line(tried, finding) for tried in report.tries if finding.fingerprint in tried.findings],
    }


def strips(report: Report) -> list[dict[str, Any]]:
    """Return the picture's rows: for each layer, its segments of the first call's graphs and the breaks, in order."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for layer, cell in _cells(report):
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


def _cells(report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the first call runs through, each with its layer; a break is shown where it comes first."""
    findings = {finding.fingerprint: (f"f{n}", finding) for n, finding in enumerate(report.findings, 1)}
    graphs = [(number, graph) for number, graph in enumerate(report.graphs) if graph.call == 0]
    for event in in_call_order(report):
        if event.what == "graph":
            at = next(at for at, (_, graph) in enumerate(graphs) if graph.compile_id == event.compile_id)
            number, graph = graphs.pop(at)
            yield from _graph_cells(number, graph, report)
        elif event.fingerprint in findings:
            link, finding = findings.pop(event.fingerprint)
            where = short(finding.where) if finding.where else "nowhere"
            title = f"{finding.cause}: {finding.op}, {where}"
            cell = {"kind": "break", "label": finding.cause, "title": title, "link": link, "colour": 0}
            yield from ((layer, cell) for layer in _layers(finding.layers, report))


def _graph_cells(number: int, graph: Graph, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    for at, segment in enumerate(graph.segments):
        name = f"graph {number + 1}" + (f".{at + 1}" if len(graph.segments) > 1 else "")
        cell = {
            "kind": "split" if segment.splitting else "segment",
            "label": (segment.splitting or name).rpartition("::")[2],
            "title": f"{name}: {segment.splitting or f'{segment.ops} ops in all'}",
            "link": None,
            "colour": (number * 3 + at) % 5,
        }
        yield from ((layer, cell) for layer in _layers(segment.layers, report))


def _layers(names: Sequence[str], report: Report) -> list[str]:
    return list(dict.fromkeys(_layer(name, report) for name in names)) or [""]


def _order(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key by which layers are ordered by number."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


def _layer(name: str, report: Report) -> str:
    """Return the layer that a module is in: the name up to its first number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: at + 1]) if at is not None else ""
