"""What torch.compile did, in order: the graphs and breaks of the first call, and the seconds of each call."""

from dataclasses import dataclass
from typing import Any

from mamba_ops.audit.outcomes import Event
from mamba_ops.audit.report import Report


def in_call_order(report: Report) -> list[Event]:
    """Return the graphs and breaks of the first call, as the call runs through them.

    Dynamo says that a graph ends before it makes it of what came by then, so a graph stands before the break of the
    same compile.
    """
    first = [event for event in report.events if event.call == 0]
    order = {name: at for at, name in enumerate(dict.fromkeys(event.compile_id for event in first))}
    return sorted(first, key=lambda event: (order[event.compile_id], event.what != "graph"))


@dataclass
class Bar:
    """A call in the timeline.

    Attributes:
        shapes, seconds: of the call.
        left, width: where it stands, in hundredths of all calls.
        parts: its compiles, each with `left` and `width` in hundredths of all calls, a title, and what it is of.
    """

    shapes: str
    seconds: float
    left: float
    width: float
    parts: list[dict[str, Any]]


def bars(report: Report) -> list[Bar]:
    """Return the calls on one axis of seconds, with the compiles in each; empty if nothing took time."""
    total = sum(row.seconds for row in report.calls)
    if not total:
        return []
    shown, at = [], 0.0
    for number, row in enumerate(report.calls):
        events = [event for event in report.events if event.call == number]
        again = {made.compile_id: made for made in report.recompiles if made.call == number}
        parts, inside = [], at
        for name in dict.fromkeys([*(event.compile_id for event in events), *again]):
            seconds = min(report.compile_seconds.get(name, 0.0), at + row.seconds - inside)
            what = [f"recompile ({', '.join(value.subject for value in again[name].changed)})"] if name in again else []
            what += [f"{event.what} ({event.text})" for event in events if event.compile_id == name]
            if seconds > 0:
                title = f"compile {name}, {seconds:.2f} s: {', '.join(what)}"
                place = {"left": 100 * inside / total, "width": 100 * seconds / total}
                parts.append({**place, "title": title, "kind": "again" if name in again else "first"})
                inside += seconds
        shown.append(Bar(row.shapes, row.seconds, 100 * at / total, 100 * row.seconds / total, parts))
        at += row.seconds
    return shown
