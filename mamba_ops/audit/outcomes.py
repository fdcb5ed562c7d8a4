"""What torch.compile made, in which order, and what came of the changes that were tried: parts of a report."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mamba_ops.audit.source_locations import SourceLocation


@dataclasses.dataclass
class GraphSegment:
    """A part of a graph between splitting ops.

    Attributes:
        ops: how many ops it has.
        splitting: the splitting op that it is, or None for what can be captured.
        layers: the modules that its ops belong to, in order.
    """

    ops: int
    splitting: str | None = None
    layers: tuple[str, ...] = ()


@dataclasses.dataclass
class Graph:
    """One graph that Dynamo made.

    Attributes:
        call: the number of the call that it was made in; 0 is the first.
        compile_id: torch's name for it; "0/1" is a second version of the first frame.
        ops: how many ops it has.
        segments: how splitting ops divide it.
    """

    call: int
    compile_id: str
    ops: int
    segments: list[GraphSegment] = dataclasses.field(default_factory=list)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Graph":
        """Return what was written as JSON."""
        segments = [GraphSegment(**{**one, "layers": tuple(one["layers"])}) for one in facts["segments"]]
        return cls(**{**facts, "segments": segments})


@dataclasses.dataclass
class CallRow:
    """What one call cost: the table of recompiles over shapes."""

    shapes: str
    graphs: int = 0
    recompiles: int = 0
    seconds: float = 0.0
    jit: int = 0


@dataclasses.dataclass(frozen=True)
class ChangedValue:
    """What a function was compiled again for: an argument, size or attribute with another value.

    Attributes:
        subject: its name, such as "x.shape[1]".
        before, now: the values; "" where they are not known.
        dynamic: whether the new version takes other values too.
    """

    subject: str
    before: str = ""
    now: str = ""
    dynamic: bool = False


@dataclasses.dataclass(frozen=True)
class Recompile:
    """One function that was compiled again.

    Attributes:
        call: the number of the call; 0 is the first.
        compile_id: torch's name for the new version, such as "0/1".
        function: its name, and the line after which it begins where it is the rest of one after a break.
        where: where it is defined.
        changed: why no version fitted.
        versions: how many there were before, of at most `limit`.
        seconds: that the compile took.
        cause: of the finding that it is counted in.
    """

    call: int
    compile_id: str
    function: str
    where: SourceLocation
    changed: tuple[ChangedValue, ...]
    versions: int
    limit: int
    seconds: float = 0.0
    cause: str = ""

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Recompile":
        """Return what was written as JSON."""
        changed = tuple(ChangedValue(**value) for value in facts["changed"])
        return cls(**{**facts, "where": SourceLocation(**facts["where"]), "changed": changed})


@dataclasses.dataclass(frozen=True)
class Event:
    """A graph or the end of one, in the order of all.

    Attributes:
        what: "graph" or "break".
        call: the number of the call; 0 is the first.
        compile_id: torch's name for the compile that it belongs to; a break ends the graph of its compile.
        at: seconds since the audit began.
        text: of a graph, the number of ops; else the cause and the line.
        fingerprint: of the finding, for breaks.
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
