"""A report as text, for a terminal or a log."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_ops.audit.outcomes import CallRow, Counts, Graph, Try
from mamba_ops.audit.recompiles import HEADINGS, story, summary
from mamba_ops.audit.report import KINDS, Change, Finding, Report, compare
from mamba_ops.audit.source_locations import SourceLocation, has_no_file

if TYPE_CHECKING:
    from rich.console import Console

_AROUND = 3  # lines of source on each side
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def grouped(layers: tuple[str, ...]) -> str:
    """Return the names of layers on one line, with ranges for the numbers of a module list."""
    if len(layers) <= 2:
        return ", ".join(layers)
    numbers: dict[tuple[str, str], list[int]] = {}
    others = []
    for name in layers:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            others.append(name)
        else:
            numbers.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), []).append(int(parts[at]))
    ranges = [
        f"{'.'.join(filter(None, (before, f'[{_ranges(sorted(set(found)))}]', after)))}"
        for (before, after), found in numbers.items()
    ]
    return ", ".join([*ranges, *others[:3]]) + (", ..." if len(others) > 3 else "") + f" ({len(layers)} modules)"


def _ranges(numbers: list[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def caller(finding: Finding) -> list[SourceLocation]:
    """Return the last line of the stack that is in a file of the user's, if the finding is not in one."""

    def is_elsewhere(file: str) -> bool:
        return "site-packages" in file or has_no_file(file)

    if finding.where is None or not is_elsewhere(finding.where.file):
        return []
    return [location for location in finding.stack if not is_elsewhere(location.file)][-1:]


def short(location: SourceLocation) -> str:
    """Return a location, relative to the current folder where it is inside."""
    with contextlib.suppress(ValueError):
        return f"{Path(location.file).relative_to(Path.cwd())}:{location.line}"
    return str(location)


def excerpt(location: SourceLocation) -> list[tuple[int, str, bool]]:
    """Return the lines around a location, each with its number and whether it is that line."""
    try:
        lines = Path(location.file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [(location.line, location.source, True)] if location.source else []
    first = max(location.line - _AROUND, 1)
    shown = lines[first - 1 : location.line + _AROUND]
    return [(number, text, number == location.line) for number, text in enumerate(shown, first)]


def lines(finding: Finding, tries: Sequence[Try] = ()) -> list[str]:
    """Return a finding as lines of text; the first is its heading. `tries` are those of the report."""
    times = f" (seen {finding.count} times)" if finding.count > 1 else ""
    text = [f"{finding.severity}: {finding.kind}/{finding.cause}: {finding.op}{times}"]
    if finding.where:
        text.append(f"{short(finding.where)} in {finding.where.function}")
        if finding.where.source:  # code of exec has none
            text.append(f"    {finding.where.source}")
        text += [f"called from {short(location)}: {location.source}" for location in caller(finding)]
    text += told(finding)
    if finding.skipped_frame:
        text.append(f"All of {finding.skipped_frame} runs without the compiler because of this.")
    if finding.layers:
        text.append(f"In {grouped(finding.layers)}")
    if finding.behind is not None:
        text.append(f"Behind {finding.behind}: the compiler meets it once that is mended.")
    if finding.processes:
        text.append(f"In {', '.join(finding.processes)}")
    if finding.needs_device:
        text.append("Only the device itself can confirm this.")
    text.append(f"-> {finding.remedy}")
    text += [f"torch's hint: {hint}" for hint in finding.hints]
    text += [f"torch's page: {finding.link}"] if finding.link else []
    return [*text, *(tried_line(tried, finding) for tried in tries if finding.fingerprint in tried.findings)]


def tried_line(tried: Try, finding: Finding | None = None) -> str:
    """Return what came of a change in a line; for a finding, also whether that is gone."""
    text = f"{tried.change}, tried: {tried.outcome}"
    if tried.after is None:
        return text
    if finding is not None:
        text += "; this is gone" if finding.fingerprint in tried.gone else "; this stays"
    return f"{text} (without: {tried.before})" if tried.before else text


def closing_lines(report: Report) -> list[str]:
    """Return what the changes that helped come to together, and what `use_mamba_ops` would change in the model."""
    text = []
    together = [tried for tried in report.tries if not tried.findings and not tried.ours]
    for tried in [tried for tried in together if tried.after is not None][-1:] or together[-1:]:
        text.append(f"All that helped, together: {tried_line(tried)}")
    text += [_in_its_place(theirs, ours) for theirs, ours in report.fronts.items()]
    for tried in report.tries:
        if tried.ours and tried.before is not None and tried.after is not None:
            text += [f"{tried.change}, tried on this model:"]
            text += [f"  before: {timed(tried.before)}", f"  after:  {timed(tried.after)}"]
        elif tried.ours:
            text.append(f"{tried.change}, tried on this model: {tried.problem}")
    return text


def _in_its_place(theirs: str, ours: str) -> str:
    """Return what to do about a function that the model imports itself."""
    told = f"{theirs}: use_mamba_ops does not bind it, as the model's own code calls it"
    return (
        f"{told}. Call {ours} in its place."
        if ours
        else f"{told}, and none of ours takes its place (mamba_ops.layers has whole mixers)."
    )


def timed(counts: Counts) -> str:
    """Return counts with the seconds that they took."""
    told = f"{counts}, {counts.seconds:.1f} s with compiling"
    if counts.warm is None:
        return told
    return f"{told}, {f'{counts.warm:.3g}' if counts.warm else 'under 0.001'} s for a call that compiles nothing"


def told(finding: Finding) -> list[str]:
    """Return what was seen, in sentences."""
    text = [finding.message]
    if len(finding.values) > 2:
        text.append(f"Values seen: {' -> '.join(finding.values)}")
    if finding.seconds:
        text.append(f"{finding.seconds:.1f} s of compiling were spent on this.")
    return text


def split_up(graph: Graph) -> str:
    """Return how splitting ops divide a graph, with repeats counted: "7 ops | 3 x (mamba_mixing | 9 ops)"."""
    parts = [segment.splitting or f"{segment.ops} ops" for segment in graph.segments]
    runs: list[tuple[list[str], int]] = []
    while parts:
        pair = parts[:2]
        times = 1
        while len(pair) == 2 and parts[2 * times : 2 * times + 2] == pair:
            times += 1
        taken = pair if times > 1 else parts[:1]
        runs.append((taken, times))
        parts = parts[len(taken) * times :]
    return " | ".join(f"{times} x ({' | '.join(run)})" if times > 1 else run[0] for run, times in runs)


def headings(report: Report) -> list[str]:
    """Return the columns of the table of calls beside the shapes; Triton's only if it compiled anything."""
    return ["new graphs", "recompiles", "seconds", "Triton compiles"][: 4 if any(c.jit for c in report.calls) else 3]


def cells(row: CallRow) -> list[str]:
    """Return a row of that table."""
    return [str(row.graphs), str(row.recompiles), f"{row.seconds:.1f}", str(row.jit)]


def show(report: Report, console: "Console") -> None:
    """Print a report."""
    from rich.table import Table
    from rich.text import Text

    absent = ", which is not present" if report.absent else ""
    title = Text(f"{report.target} on {report.device}{absent} (torch {report.torch})", "bold")
    verdict = Text(report.verdict, "green" if report.clean else "bold red")
    for text in (verdict, title) if report.unwatched else (title, verdict):  # what was not seen comes first
        console.print(text)
    if report.mixers:
        console.print(Text(f"It holds {', '.join(report.mixers)}."), soft_wrap=True)
    numbered = any(finding.behind is not None for finding in report.findings)
    for number, finding in enumerate(report.findings, 1):
        heading, *rest = lines(finding, report.tries)
        console.print()
        console.print(Text(f"{number}. {heading}" if numbered else heading, _STYLES[finding.severity]))
        for line in rest:
            console.print(Text(f"  {line}", "bold" if line.startswith("->") else ""), soft_wrap=True)
    if report.calls:
        console.print()
        table = Table(title="Calls", title_justify="left")
        table.add_column("shapes")
        for heading in headings(report):
            table.add_column(heading, justify="right")
        for row in report.calls:
            table.add_row(Text(row.shapes), *cells(row)[: len(headings(report))])
        console.print(table)
    if report.recompiles:
        console.print()
        table = Table(title=f"Recompiles: {summary(report)}", title_justify="left")
        for heading in HEADINGS:
            numbers = heading in ("of limit", "seconds")
            table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
        for recompile in story(report):
            table.add_row(*map(Text, recompile.cells))
        console.print(table)
    splits = Counter(split_up(graph) for graph in report.graphs if any(segment.splitting for segment in graph.segments))
    for parts, count in splits.items():
        console.print(Text(f"{count} graph{'s' * (count > 1)}: {parts}"), soft_wrap=True)
    for op, ran in report.backends.items():
        console.print(Text(f"{op} {'would run' if report.absent else 'ran'} on {ran}"), soft_wrap=True)
    for note in report.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    for line in closing_lines(report):
        console.print(Text(line, "bold"), soft_wrap=True)


def show_changes(report: Report, before: Report, console: "Console") -> None:
    """Print the differences to another report."""
    from rich.text import Text

    changes = compare(report, before)
    console.print()
    console.print(Text("Since the other report:" if changes else "Since the other report nothing has changed.", "bold"))
    for change in changes:
        console.print(
            Text(f"  {describe(change)}", "green" if change.what in ("gone", "fewer") else "red"), soft_wrap=True
        )


def describe(change: Change) -> str:
    """Return a change in a line."""
    finding = change.finding
    counts = "" if change.what in ("new", "gone") else f" {change.before} -> {change.after}"
    where = f" at {short(finding.where)}" if finding.where else ""
    return f"{change.what}{counts}: {KINDS[finding.kind]}, {finding.op}{where}"
