"""One report from those of several processes, such as the ranks of a distributed run."""

import dataclasses
from collections.abc import Sequence

from mamba_ops.audit.processes import name_of_rank
from mamba_ops.audit.report import Report


def merge(reports: Sequence[Report], ranks: Sequence[int] | None = None) -> Report:
    """Return one report: findings that agree are one, with the names of the ranks in which they were found.

    Calls, graphs, recompiles, events and tries are those of the first report, as ranks run the same code. Of findings
    the highest count and the most seconds of any rank are kept.

    Args:
        reports: one of each process.
        ranks: of these; None: 0, 1, 2, ..., where a report does not say its own.

    Raises:
        ValueError: there are none, or a rank comes twice.
    """
    if not reports:
        raise ValueError("merge: got no reports, expected one at least")
    numbers = [
        rank if ranks else (report.ranks[0] if report.ranks else rank)
        for rank, report in zip(ranks or range(len(reports)), reports, strict=True)
    ]
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"merge: got reports of the ranks {numbers}, expected each rank once")
    order = sorted(range(len(reports)), key=lambda at: numbers[at])
    first = reports[order[0]]
    merged = dataclasses.replace(first, findings=[], notes=[], unwatched=0, ranks=tuple(sorted(numbers)))
    for at in order:
        report, name = reports[at], name_of_rank(numbers[at])
        places = []  # in the merged report, of this report's findings
        for finding in report.findings:
            place = next((n for n, known in enumerate(merged.findings) if known.is_same(finding)), None)
            if place is None:
                place = len(merged.findings)
                merged.findings.append(dataclasses.replace(finding, processes=(name,)))
            else:
                same = merged.findings[place]
                same.count, same.seconds = max(same.count, finding.count), max(same.seconds, finding.seconds)
                same.processes = (*same.processes, name)
            places.append(place)
        for finding, place in zip(report.findings, places, strict=True):
            if finding.behind is not None and merged.findings[place].processes == (name,):
                merged.findings[place].behind = places[finding.behind - 1] + 1
        merged.notes += [note for note in report.notes if note not in merged.notes]
        merged.finished &= report.finished
        merged.unwatched += report.unwatched
    merged.sort()
    return merged
