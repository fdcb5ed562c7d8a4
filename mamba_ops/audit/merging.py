"""One report from those of several processes, such as the ranks of a distributed run."""

import dataclasses
from collections.abc import Sequence

from mamba_ops.audit.report import Report


def merge(reports: Sequence[Report], ranks: Sequence[int] | None = None) -> Report:
    """Return one report: findings that agree are one, with the ranks in which they were found.

    Calls, graphs, events and tries are those of the first report, as ranks run the same code; of findings the highest
    count of any rank is kept.

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
    merged = dataclasses.replace(first, findings=[], notes=[], ranks=tuple(sorted(numbers)))
    for at in order:
        report, rank = reports[at], numbers[at]
        for finding in report.findings:
            same = next((known for known in merged.findings if known.key == finding.key), None)
            if same is None:
                merged.findings.append(dataclasses.replace(finding, ranks=(rank,)))
            else:
                same.count = max(same.count, finding.count)
                same.ranks = (*same.ranks, rank)
        merged.notes += [note for note in report.notes if note not in merged.notes]
        merged.finished &= report.finished
    merged.sort()
    return merged
