"""The findings of an audit as data: written to JSON, read back, and compared with an older report."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mamba_ops.audit.source_locations import SourceLocation

VERSION = 3  # of the JSON; raised when a name in it changes its meaning
SEVERITIES = ("error", "warning", "note")
KINDS = {
    "break": "graph breaks",
    "sync": "waits for the device",
    "capture": "reasons why no CUDA graph is recorded",
    "kernel": "kernels that the compiler cannot see through or place",
    "recompile": "recompiles",
    "copy": "copies for mutated inputs",
    "fallback": "slow paths taken in silence",
    "jit": "Triton kernels compiled",
    "stopped": "places where the trace had to stop",
}
_ONE = {
    "break": "graph break",
    "sync": "wait for the device",
    "capture": "reason why no CUDA graph is recorded",
    "kernel": "kernel that the compiler cannot see through or place",
    "recompile": "recompile",
    "copy": "copy for a mutated input",
    "fallback": "slow path taken in silence",
    "jit": "Triton kernel compiled",
    "stopped": "place where the trace had to stop",
}


def counted(kind: str, count: int) -> str:
    """Return "1 graph break" or "3 graph breaks"."""
    return f"{count} {_ONE[kind] if count == 1 else KINDS[kind]}"


@dataclasses.dataclass
class Total:
    """How much there is of a kind.

    Attributes:
        kind: one of `KINDS`.
        findings: above a note.
        times: how often those were seen.
        notes: how many notes there are.
        seconds: of compiling again, notes included.
    """

    kind: str
    findings: int = 0
    times: int = 0
    notes: int = 0
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """As in "2 graph breaks (seen 5 times)"."""
        seen = f" (seen {self.times} times)" if self.times > self.findings else ""
        return counted(self.kind, self.findings) + seen


@dataclasses.dataclass
class Finding:
    """One thing that costs speed, or stops `fullgraph=True`.

    Attributes:
        kind: one of `KINDS`.
        cause: the class of the reason; it selects the remedy.
        severity: "error" (the model is not compiled as a whole), "warning" (it costs time) or "note".
        op: the function, op, guard or argument involved.
        message: what torch said, or what was seen, in a sentence.
        remedy: what to change, in one sentence.
        where: the line of the user's code; None if it is not known.
        stack: the calls that led there, outermost first, without torch's own frames.
        count: how often it was seen; identical findings of several layers are one.
        layers: names of the modules in which that code runs.
        breaks: whether a graph ended here.
        skipped_frame: the function that was not compiled at all because of this.
        needs_device: whether only the real device can confirm it.
        bytes: of a copy, where it is known.
        values: of a recompile, what the argument or size was, in the order in which it was seen.
        seconds: that were spent on compiling again because of it.
        mend_first: the break without which this would not be, as "file:line in function, op".
        behind: the number of the finding that hides this one from the compiler, 1 for the report's first; None if it is
            met as things are.
        processes: the names of those in which it was seen, such as "rank 0", where there were several.
    """

    kind: str
    cause: str
    severity: str
    op: str
    message: str
    remedy: str
    where: SourceLocation | None = None
    stack: tuple[SourceLocation, ...] = ()
    count: int = 1
    layers: tuple[str, ...] = ()
    breaks: bool = False
    skipped_frame: str | None = None
    needs_device: bool = False
    bytes: int | None = None
    values: tuple[str, ...] = ()
    seconds: float = 0.0
    mend_first: str | None = None
    behind: int | None = None
    processes: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for findings that are counted as one."""
        if self.cause == "size":  # functions of one file, to which one size is passed, recompile together
            dims = ",".join(re.findall(r"\.shape\[(\d+)\]", self.op))
            return (self.kind, self.cause, self.where.file if self.where else "", dims, *self.values)
        return (self.kind, self.cause, str(self.where), self.op)

    def is_same(self, other: "Finding") -> bool:
        """Whether another finding is counted as this one."""
        if self.key != other.key:
            return False
        one_function = self.where is not None and other.where is not None and str(self.where) == str(other.where)
        return self.op == other.op or not one_function  # two arguments of one function are two findings

    @property
    def counted_as(self) -> str:
        """The kind in totals: one that ends a graph is a break."""
        return "break" if self.breaks else self.kind

    @property
    def classes(self) -> set[str]:
        """The names for it in `--fail-on`."""
        return {self.kind} | ({"break"} if self.breaks else set())


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


@dataclasses.dataclass
class Report:
    """All findings of one audit.

    Attributes:
        target, device: what was audited, and where.
        absent: whether the device is not present on this machine, so that nothing ran.
        calls: one row for each call.
        mixers: the classes of the model's modules that mix tokens: attention, convolutions, recurrences.
        graphs: in the order in which they were made.
        recompiles: in the order in which they were made; each is counted in one finding.
        backends: for our ops: which backend ran how often, and each refusal.
        notes: what was left out or replaced, in sentences.
        unwatched: how many processes in Python were started and not watched.
        finished: False if it was interrupted or ran out of time; the rest is what was known then.
    """

    target: str
    device: str = "cpu"
    absent: bool = False
    findings: list[Finding] = dataclasses.field(default_factory=list)
    calls: list[CallRow] = dataclasses.field(default_factory=list)
    mixers: list[str] = dataclasses.field(default_factory=list)
    graphs: list[Graph] = dataclasses.field(default_factory=list)
    recompiles: list[Recompile] = dataclasses.field(default_factory=list)
    backends: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    torch: str = ""
    unwatched: int = 0
    finished: bool = True

    @property
    def clean(self) -> bool:
        """Whether there is nothing to change: no finding above a note."""
        return self.finished and not self.incomplete and not self.failing(KINDS)

    @property
    def compiled_nothing(self) -> bool:
        """Whether torch.compile did nothing at all that was seen: there is no graph, and nothing that prevented one."""
        return not self.graphs and not any(finding.severity != "note" for finding in self.findings)

    @property
    def incomplete(self) -> bool:
        """Whether the report cannot say that all is well: nothing was compiled, or a process was not watched."""
        return self.compiled_nothing or self.unwatched > 0

    @property
    def verdict(self) -> str:
        """The report in one sentence; a finding that ends a graph counts as a graph break."""
        if self.unwatched:
            were = "1 process was" if self.unwatched == 1 else f"{self.unwatched} processes were"
            return f"{were} not watched. {self._found}"
        return self._found

    @property
    def _found(self) -> str:
        counts = ", ".join(total.words for total in self.totals if total.findings)
        if not self.finished:
            return f"Interrupted. Found by then: {counts or 'nothing'}."
        if counts:
            return f"Found: {counts}."
        if self.compiled_nothing:
            return "Nothing was compiled."
        count = len(self.graphs)
        return f"Nothing to change: {count} graph{'s' if count != 1 else ''}, no break."

    @property
    def totals(self) -> "list[Total]":
        """How many findings there are of each kind, the same in every view; one that ends a graph is a break."""
        found: dict[str, Total] = {}
        for finding in self.findings:
            total = found.setdefault(finding.counted_as, Total(finding.counted_as))
            if finding.severity == "note":
                total.notes += 1
            else:
                total.findings += 1
                total.times += finding.count
            total.seconds = round(total.seconds + finding.seconds, 3)
        return [found[kind] for kind in KINDS if kind in found]

    def failing(self, classes: Iterable[str]) -> list[Finding]:
        """Return the findings above a note that belong to one of these kinds."""
        wanted = set(classes)
        return [finding for finding in self.findings if finding.classes & wanted and finding.severity != "note"]

    def add(self, finding: Finding) -> Finding:
        """Add a finding, or count it if it is known already; return the one that is kept."""
        for known in self.findings:
            if known.is_same(finding):
                known.count += finding.count
                known.layers = tuple(dict.fromkeys(known.layers + finding.layers))
                known.skipped_frame = known.skipped_frame or finding.skipped_frame
                known.breaks |= finding.breaks
                known.values = tuple(dict.fromkeys(known.values + finding.values))
                known.seconds = round(known.seconds + finding.seconds, 3)
                known.mend_first = known.mend_first and finding.mend_first  # one that stands alone is to be mended
                known.processes = tuple(dict.fromkeys(known.processes + finding.processes))
                if SEVERITIES.index(finding.severity) < SEVERITIES.index(known.severity):
                    known.severity = finding.severity
                return known
        self.findings.append(finding)
        return finding

    def sort(self) -> None:
        """Put first what cost the most seconds, and of what cost none, the worst."""
        kinds, before = list(KINDS), list(self.findings)
        self.findings.sort(key=lambda f: (-f.seconds, SEVERITIES.index(f.severity), kinds.index(f.kind), -f.count))
        for finding in self.findings:
            if finding.behind is not None:
                hiding = before[finding.behind - 1]
                finding.behind = 1 + next(i for i, f in enumerate(self.findings) if f is hiding)

    def to_json(self) -> str:
        """Return the report as JSON; `from_json` reads it."""
        totals = [dataclasses.asdict(total) for total in self.totals]
        facts = {"version": VERSION, "verdict": self.verdict, "totals": totals, **dataclasses.asdict(self)}
        return json.dumps(facts, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no report, or one of another version.
        """
        facts = json.loads(text)
        if not isinstance(facts, dict) or facts.get("version") != VERSION:
            got = facts.get("version") if isinstance(facts, dict) else type(facts).__name__
            raise ValueError(f"got a report of version {got}, expected {VERSION}")
        facts = {name: value for name, value in facts.items() if name not in ("version", "verdict", "totals")}
        facts["findings"] = [_finding(finding) for finding in facts["findings"]]
        facts["calls"] = [CallRow(**row) for row in facts["calls"]]
        facts["graphs"] = [
            Graph(**{**graph, "segments": [_segment(segment) for segment in graph["segments"]]})
            for graph in facts["graphs"]
        ]
        facts["recompiles"] = [_recompile(recompile) for recompile in facts["recompiles"]]
        return cls(**facts)


def _segment(facts: Mapping[str, Any]) -> GraphSegment:
    return GraphSegment(**{**facts, "layers": tuple(facts["layers"])})


def _recompile(facts: Mapping[str, Any]) -> Recompile:
    changed = tuple(ChangedValue(**value) for value in facts["changed"])
    return Recompile(**{**facts, "where": SourceLocation(**facts["where"]), "changed": changed})


def _finding(facts: Mapping[str, Any]) -> Finding:
    where = SourceLocation(**facts["where"]) if facts["where"] else None
    stack = tuple(SourceLocation(**location) for location in facts["stack"])
    tuples = {name: tuple(facts[name]) for name in ("layers", "values", "processes")}
    return Finding(**{**facts, "where": where, "stack": stack, **tuples})


@dataclasses.dataclass(frozen=True)
class Change:
    """A difference to another report: a finding is "new" or "gone", or was seen "more" or "fewer" times."""

    what: str
    finding: Finding
    before: int
    after: int


def compare(now: Report, before: Report) -> list[Change]:
    """Return what got worse or better; lines may have moved, so findings are matched by file and source line."""
    found, found_before = _by_source(now), _by_source(before)
    changes = []
    for key in dict.fromkeys([*found, *found_before]):
        old, new = found_before.get(key, []), found.get(key, [])
        counts = sum(f.count for f in old), sum(f.count for f in new)
        if counts[0] != counts[1]:
            what = "new" if not old else "gone" if not new else "more" if counts[1] > counts[0] else "fewer"
            changes.append(Change(what, (new or old)[0], *counts))
    return changes


def _by_source(report: Report) -> dict[tuple[str, ...], list[Finding]]:
    found: dict[tuple[str, ...], list[Finding]] = {}
    for finding in report.findings:
        where = (Path(finding.where.file).name, finding.where.source) if finding.where else ("", "")
        found.setdefault((finding.kind, finding.cause, finding.op, *where), []).append(finding)
    return found
