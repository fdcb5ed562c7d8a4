"""What an audit saw in order, and what came of the changes that it tried: parts of a report."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that torch.compile did.

    Attributes:
        what: "graph", "break" or "recompile".
        call: the number of the call; 0 is the first.
        compile_id: torch's name for the compile that it belongs to; a break ends the graph of its compile.
        at: seconds since the audit began.
        text: of a graph, the number of ops; else the cause and the line.
        fingerprint: of the finding, for breaks and recompiles.
    """

    what: str
    call: int
    compile_id: str
    at: float
    text: str = ""
    fingerprint: str = ""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What all calls of an audit came to.

    Attributes:
        graphs: in the first call.
        breaks: places in which a graph ended in the first call.
        recompiles: in all calls.
        seconds: that all calls took, compiles included.
        warm: seconds of one more call, which compiles nothing; None if it was not made.
    """

    graphs: int
    breaks: int
    recompiles: int
    seconds: float
    warm: float | None = None

    def __str__(self) -> str:
        parts = [_number(self.graphs, "graph"), _number(self.breaks, "break")]
        return ", ".join(parts + ([_number(self.recompiles, "recompile")] if self.recompiles else []))


@dataclasses.dataclass(frozen=True)
class Try:
    """A change that was made without touching the code, and what came of it.

    Attributes:
        change: what was done, as one would write it.
        findings: fingerprints of the findings that it might mend.
        before, after: the counts without and with it; no `after`, if it failed.
        gone: fingerprints of the findings that are not found with it.
        problem: why there is no outcome, in a sentence.
        ours: whether it put the ops of this library under the model.
    """

    change: str
    findings: tuple[str, ...] = ()
    before: Counts | None = None
    after: Counts | None = None
    gone: tuple[str, ...] = ()
    problem: str = ""
    ours: bool = False

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Try":
        """Return what was written as JSON."""
        counts = {name: Counts(**facts[name]) if facts[name] else None for name in ("before", "after")}
        return cls(**{**facts, **counts, "findings": tuple(facts["findings"]), "gone": tuple(facts["gone"])})

    @property
    def outcome(self) -> str:
        """What came of it: "1 graph, 0 breaks"."""
        return str(self.after) if self.after is not None else self.problem


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
