"""The findings of an audit as data: written to JSON, read back, and compared with an older report."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mamba_ops.audit.fingerprints import fingerprint
from mamba_ops.audit.outcomes import CallRow, Event, Graph, Recompile, Try
from mamba_ops.audit.source_locations import SourceLocation

SCHEMA_VERSION = 3  # of the JSON; raised when a name in it changes its meaning
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
        seconds: of compiling: again because of it, or of what follows a break.
        mend_first: the break without which this would not be, as "file:line in function, op".
        behind: the number of the finding that hides this one from the compiler, 1 for the report's first; None if it is
            met as things are.
        processes: the names of those in which it was seen, such as "rank 0", where there were several.
        hints: what torch says can be done, in its own words.
        link: torch's page about a break of this type.
        fingerprint: the same for this finding in another report, where code was moved in its file or formatted.
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
    hints: tuple[str, ...] = ()
    link: str | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            self.fingerprint = fingerprint(self.kind, self.cause, self.op, self.where)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Finding":
        """Return what was written as JSON."""
        where = SourceLocation(**facts["where"]) if facts["where"] else None
        stack = tuple(SourceLocation(**location) for location in facts["stack"])
        several = {name: tuple(facts[name]) for name in ("layers", "values", "processes", "hints")}
        return cls(**{**facts, **several, "where": where, "stack": stack})

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
    def hides(self) -> bool:
        """Whether what stands behind it in the same function is not looked at by the compiler."""
        return self.skipped_frame is not None or self.cause == "compiler-error"

    @property
    def classes(self) -> set[str]:
        """The names for it in `--fail-on`."""
        return {self.kind} | ({"break"} if self.breaks else set())


@dataclasses.dataclass
class Report:
    """All findings of one audit.

    Attributes:
        target, device: what was audited, and where.
        absent: whether the device is not present on this machine, so that nothing ran.
        calls: one row for each call.
        mixers: the classes of the model's modules that mix tokens: attention, convolutions, recurrences.
        fronts: functions of mamba_ssm, causal_conv1d, fla and vLLM that the model calls, each with ours for it, or "".
        graphs: in the order in which they were made.
        recompiles: in the order in which they were made; each is counted in one finding.
        backends: for our ops: which backend ran how often, and each refusal.
        notes: what was left out or replaced, in sentences.
        unwatched: how many processes in Python were started and not watched.
        finished: False if it was interrupted or ran out of time; the rest is what was known then.
        events: graphs and breaks in the order in which they came.
        compile_seconds: of each compile, by torch's name for it.
        tries: changes that were tried without touching the code.
        ranks: of a distributed run, those that the report is of.
    """

    target: str
    device: str = "cpu"
    absent: bool = False
    findings: list[Finding] = dataclasses.field(default_factory=list)
    calls: list[CallRow] = dataclasses.field(default_factory=list)
    mixers: list[str] = dataclasses.field(default_factory=list)
    fronts: dict[str, str] = dataclasses.field(default_factory=dict)
    graphs: list[Graph] = dataclasses.field(default_factory=list)
    recompiles: list[Recompile] = dataclasses.field(default_factory=list)
    backends: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    torch: str = ""
    unwatched: int = 0
    finished: bool = True
    events: list[Event] = dataclasses.field(default_factory=list)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    tries: list[Try] = dataclasses.field(default_factory=list)
    ranks: tuple[int, ...] = ()

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

    def failing(self, classes: Iterable[str], before: "Report | None" = None) -> list[Finding]:
        """Return the findings above a note that belong to one of these kinds.

        Args:
            classes: kinds; "new" among them restricts the others to findings that `before` does not hold, and alone
                stands for all of these.
            before: an older report.

        Raises:
            ValueError: "new" is asked for, and there is no older report.
        """
        wanted = set(classes)
        found = [finding for finding in self.findings if finding.severity != "note"]
        if "new" in wanted:
            if before is None:
                raise ValueError(
                    "failing: before: got None, expected an older report, in which to look for what is new"
                )
            new = {id(change.finding) for change in compare(self, before) if change.what == "new"}
            found = [finding for finding in found if id(finding) in new]
            wanted.discard("new")
            if not wanted:
                return found
        return [finding for finding in found if finding.classes & wanted]

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
        told = {"schema_version": SCHEMA_VERSION, "verdict": self.verdict, "totals": totals}
        return json.dumps({**told, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no report, or one of another version.
        """
        facts = json.loads(text)
        got = facts.get("schema_version") if isinstance(facts, dict) else type(facts).__name__
        if not isinstance(facts, dict) or got != SCHEMA_VERSION:
            raise ValueError(f"got a report of version {got}, expected {SCHEMA_VERSION}; audit once more to write one")
        told = ("schema_version", "verdict", "totals")
        facts = {name: value for name, value in facts.items() if name not in told}
        facts["findings"] = [Finding.read(finding) for finding in facts["findings"]]
        facts["calls"] = [CallRow(**row) for row in facts["calls"]]
        facts["graphs"] = [Graph.read(graph) for graph in facts["graphs"]]
        facts["recompiles"] = [Recompile.read(recompile) for recompile in facts["recompiles"]]
        facts["events"] = [Event(**event) for event in facts["events"]]
        facts["tries"] = [Try.read(tried) for tried in facts["tries"]]
        facts["ranks"] = tuple(facts["ranks"])
        return cls(**facts)


@dataclasses.dataclass(frozen=True)
class Change:
    """A difference to another report: a finding is "new" or "gone", or was seen "more" or "fewer" times."""

    what: str
    finding: Finding
    before: int
    after: int


def compare(now: Report, before: Report) -> list[Change]:
    """Return what got worse or better; findings are matched by their fingerprints, as lines may have moved.

    Of equal statements in one function, as many are new as there are more of them.
    """
    found, found_before = _by_fingerprint(now), _by_fingerprint(before)
    changes = []
    for key in dict.fromkeys([*found, *found_before]):
        old, new = found_before.get(key, []), found.get(key, [])
        changes += [Change("new", finding, 0, finding.count) for finding in new[len(old) :]]
        changes += [Change("gone", finding, finding.count, 0) for finding in old[len(new) :]]
        for one, other in zip(old, new, strict=False):
            if one.count != other.count:
                changes.append(Change("more" if other.count > one.count else "fewer", other, one.count, other.count))
    return changes


def _by_fingerprint(report: Report) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        found.setdefault(finding.fingerprint, []).append(finding)
    return found
