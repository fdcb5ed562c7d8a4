"""The story of recompiles: what changed from call to call, what became dynamic, and the seconds that each cost."""

import dataclasses
import inspect
import re
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba_ops.audit import _torch
from mamba_ops.audit.guards import (
    FOLLOWING,
    Guard,
    classify_guard_of_optimizer,
    failed_guards,
    guard_subject,
    guard_text,
)
from mamba_ops.audit.outcomes import ChangedValue, Recompile
from mamba_ops.audit.remedies import RULES
from mamba_ops.audit.report import SEVERITIES, Finding, Report
from mamba_ops.audit.source_locations import (
    SourceLocation,
    current_locations,
    function_name,
    guard_location,
    is_user_code,
)

if TYPE_CHECKING:
    from mamba_ops.audit.collect import Collector

_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+)_at_(\d+)")
_OF_ARGUMENT = ("size", "size-one", "dtype", "rank", "strides", "requires-grad", "device", "dispatch-keys")
_NAMED = 3  # arguments in a heading


@dataclasses.dataclass
class _Open:
    """A recompile that torch is at."""

    made: Recompile
    code: types.CodeType
    guards: list[Guard]
    reasons: Sequence[str]
    calls: tuple[SourceLocation, ...]  # the user code that called the function
    dynamic: set[str] | None = None  # torch's expressions for what is dynamic in the new version; None: no graph


class Recompiles:
    """Adds recompiles to a report, each once its compile is over: only then is known what became dynamic."""

    def __init__(self, collector: "Collector") -> None:
        self._collector = collector
        self._open: _Open | None = None
        self._began = 0.0
        self._calls_of: dict[str, int] = {}  # by compile id: the number of the call
        self._used: dict[tuple[str, int, str], tuple[SourceLocation, ...]] = {}  # where a function uses a value
        self._dynamic: set[tuple[str, int, str]] = set()  # what torch called dynamic
        self._after: dict[str, Finding] = {}  # by compile id: the break after which this goes on

    def begin_compile(self, compile_id: str) -> None:
        """Note that torch begins to compile a function, for the first time or again."""
        if self._open is not None and self._open.made.compile_id != compile_id:
            self.settle()
        self._began = time.perf_counter()
        self._calls_of[compile_id] = self._collector.call

    def begin(self, reasons: Sequence[str], entries: Sequence[Any], frame: Any) -> None:
        """Note that a function is compiled again."""
        self.settle()
        guards = failed_guards(reasons, entries, frame)
        code = self._collector.layers.unwrapped(frame.f_code)
        if (called := _called_inside(frame)) is not None:
            code, names = called
            guards = [dataclasses.replace(guard, subject=_renamed(guard.subject, names)) for guard in guards]
        if "/torch/optim/" in Path(code.co_filename).as_posix():
            guards = [dataclasses.replace(g, cause=classify_guard_of_optimizer(g.text) or g.cause) for g in guards]
        self._open = _Open(
            Recompile(
                max(self._collector.call, 0),
                _torch.compile_id(),
                named(code),
                SourceLocation.defined(code),
                (),
                len(entries),
                _torch.recompile_limit(),
            ),
            code,
            guards,
            reasons,
            current_locations(),
        )

    def add_graph(self, output: Any, module: torch.fx.GraphModule, compile_id: str) -> None:
        """Note what is dynamic in a graph, and after which break it goes on."""
        self._calls_of[compile_id] = self._collector.call
        if self._open is not None and self._open.made.compile_id == compile_id:
            self._open.dynamic = {*_dynamic_inputs(module), *_dynamic_sizes(output)}
        code = getattr(getattr(output, "root_tx", None), "f_code", None)
        if code is not None and (broken := self._break_before(code, ())) is not None:
            self._after[compile_id] = broken

    def add_break(self, finding: Finding) -> None:
        """Note that the function that torch compiles now is not compiled at all."""
        self._after[_torch.compile_id()] = finding

    def end_compile(self, compile_id: str) -> None:
        """Note that a compile is over, and what it cost."""
        seconds = round(time.perf_counter() - self._began, 3)
        self._collector.report.compile_seconds[compile_id] = seconds
        if self._open is not None and self._open.made.compile_id == compile_id:
            self.settle(seconds)
        elif (broken := self._after.get(compile_id)) is not None:
            broken.seconds = round(broken.seconds + seconds, 3)

    def settle(self, seconds: float = 0.0) -> None:
        """Add the recompile that is over."""
        one, self._open = self._open, None
        if one is None:
            return
        known = one.dynamic
        dynamic = [known is None or not guard.source or guard.source in known for guard in one.guards]
        became = [self._becomes_dynamic(one, guard) for guard in one.guards]
        causes = [_settled(*facts) for facts in zip(one.guards, dynamic, became, strict=True)]
        changed = tuple(
            ChangedValue(guard.name, guard.before, guard.now, is_known)
            for guard, is_known in zip(one.guards, became, strict=True)
        )
        # A cause that torch can make dynamic matters only if there is no other: the others stand first.
        cause = causes[0] if one.guards[0].cause not in FOLLOWING else min(causes, key=_severity)
        guards = [guard for guard, settled in zip(one.guards, causes, strict=True) if settled == cause]
        if one.made.versions >= one.made.limit:
            cause = "limit"
        made = dataclasses.replace(one.made, changed=changed, seconds=seconds, cause=cause)
        self._collector.report.recompiles.append(made)
        self._add(one, cause, guards, seconds)

    def _add(self, one: _Open, cause: str, guards: Sequence[Guard], seconds: float) -> None:
        subjects = list(dict.fromkeys(guard.subject for guard in guards))
        subject = ", ".join(subjects[:_NAMED]) + (f" and {len(subjects) - _NAMED} more" if subjects[_NAMED:] else "")
        told = next((reason for reason in one.reasons if guard_subject(guard_text(reason)) == guards[0].subject), "")
        if is_user_code(one.code.co_filename):
            stack, callers = (
                () if cause in _OF_ARGUMENT else self._used_at(told, one.code, guards[0].subject),
                one.calls,
            )
        else:  # torch's own, such as a compiled optimizer.step or nn.Sequential
            stack, callers = one.calls, ()
        broken = self._break_before(one.code, one.calls) if self._is_consequence(one) else None
        self._collector.add(
            cause,
            named(one.code) if cause == "limit" else subject,
            "; ".join(map(str, one.guards[:8])),
            stack,
            callers=callers,
            fallback=one.made.where,
            values=guards[0].values,
            seconds=seconds,
            mend_first=_described(broken) if broken else None,
        )

    def _becomes_dynamic(self, one: _Open, guard: Guard) -> bool:
        """Whether torch says that a value is dynamic now; not where it said so, and compiled for the next one again."""
        if one.dynamic is None or guard.source not in one.dynamic:
            return False
        name = (one.code.co_filename, one.code.co_firstlineno, guard.source)
        again = name in self._dynamic and guard.cause in ("attribute", "hyperparameter")
        self._dynamic.add(name)
        return not again

    def _used_at(self, told: str, code: types.CodeType, subject: str) -> tuple[SourceLocation, ...]:
        """Return where a value is used: torch says it of one guard of each version, so it is kept for the others."""
        name = (code.co_filename, code.co_firstlineno, subject)
        return self._used.setdefault(name, found) if (found := guard_location(told, code)) else self._used.get(name, ())

    def _is_consequence(self, one: _Open) -> bool:
        """Whether this would not be without a break.

        That is so of a value from before a break, and of one that differs between two uses of a function within one
        call of the model: in a graph without a break both would be inlined, each for itself.
        """
        if one.guards[0].is_from_before_a_break:
            return True
        return not self._collector.watches and self._calls_of.get(one.guards[0].version) == self._collector.call

    def _break_before(self, code: types.CodeType, calls: Sequence[SourceLocation]) -> Finding | None:
        """Return the break because of which a function is compiled for itself."""
        callers = [(location.file, location.line, location.function) for location in reversed(calls)]
        if resumed := _RESUMED.search(code.co_name):
            callers.insert(0, (code.co_filename, int(resumed[2]), ""))
        for file, line, function in callers:
            for finding, stack in self._collector.broken:
                if any((at.file, at.line) == (file, line) for at in stack):
                    return finding
                if function and finding.skipped_frame and stack:
                    frame = finding.skipped_frame.partition(" after line ")[0]
                    if frame.rpartition(".")[2] == function and any(at.file == file for at in stack):
                        return finding
        return None


def _called_inside(frame: Any) -> tuple[types.CodeType, Sequence[str]] | None:
    """Return what a wrapper of torch's calls: it compiles functions of its own, such as nn.Sequential, inside one.

    With its code come the names of the arguments that the wrapper has as `args`.
    """
    if not frame.f_code.co_filename.endswith("torch/_dynamo/external_utils.py"):
        return None
    fn = frame.f_locals.get("fn")
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, torch.nn.Module):
        function = type(owner).forward
    else:
        function = fn if isinstance(fn, (types.FunctionType, types.MethodType)) else type(fn).__call__
    code = getattr(inspect.unwrap(function), "__code__", None)
    if not isinstance(code, types.CodeType):
        return None
    return code, code.co_varnames[code.co_argcount > 0 and code.co_varnames[0] == "self" : code.co_argcount]


def _renamed(subject: str, names: Sequence[str]) -> str:
    def name(of: re.Match[str]) -> str:
        return names[int(of[1])] if int(of[1]) < len(names) else of[0]

    return re.sub(r"^args\[(\d+)\]", name, subject)


def _severity(cause: str) -> int:
    return SEVERITIES.index(RULES[cause].severity)


def _settled(guard: Guard, is_dynamic: bool, is_known: bool) -> str:
    """Return the cause, now that it is known whether the value became dynamic.

    `is_known`: whether torch says so of this very value, and does not merely say nothing against it.
    """
    if guard.cause in ("attribute", "hyperparameter") and is_known:
        return "number"
    if guard.cause == "size" and not is_dynamic:
        return "size-fixed"
    if guard.cause == "number" and not is_dynamic and guard.now not in ("0", "1"):  # always compiled for themselves
        return "constant"
    return guard.cause


def _dynamic_inputs(module: torch.fx.GraphModule) -> list[str]:
    """Return torch's expressions for the numbers, and sizes of tensors, that a graph is given as inputs."""
    found: list[str] = []
    for node in module.graph.nodes:
        source = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", None)
        value = node.meta.get("example_value")
        if node.op != "placeholder" or source is None:
            continue
        name = str(source() if callable(source) else source)
        if isinstance(value, Tensor):
            found += [name] if not value.dim() else []
            found += [f"{name}.size()[{dim}]" for dim, size in enumerate(value.shape) if _is_symbol(size)]
        elif _is_symbol(value):
            found.append(name)
    return found


def _dynamic_sizes(output: Any) -> list[str]:
    """Return torch's expressions for what Dynamo traced as a symbol, also where the graph has no use for it."""
    shapes = getattr(output, "shape_env", None)
    symbols = getattr(shapes, "var_to_sources", None) or {}
    fixed = {symbol for symbol, value in getattr(shapes, "replacements", {}).items() if value.is_number}
    sources = [source for symbol, found in symbols.items() if symbol not in fixed for source in found]
    return [str(source.name() if callable(source.name) else source.name) for source in sources]


def _is_symbol(size: Any) -> bool:
    """Whether a size is one that a graph takes any value of."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _described(finding: Finding) -> str:
    at = finding.where
    where = f"{Path(at.file).name}:{at.line} in {at.function}" if at else "an unknown line"
    return f"{where} ({finding.op})"


def named(code: types.CodeType) -> str:
    """Return a function's name, and the line after which it begins where Dynamo compiled the rest of one."""
    name = str(getattr(code, "co_qualname", code.co_name))  # Python 3.10 has no qualified name here
    after = _RESUMED.search(name)
    return function_name(name) + (f" after line {after[2]}" if after else "")


@dataclasses.dataclass
class Row:
    """What changed in one function: a row of the table of recompiles.

    Attributes:
        subject: the argument, size or attribute.
        function: in which it is.
        values: that were seen, in their order.
        calls: the numbers of the calls that compiled again, from 1.
        dynamic: since which call it is dynamic, or None.
        versions: of the function now, of at most `limit`.
        seconds: of these compiles.
    """

    subject: str
    function: str
    values: list[str]
    calls: list[int]
    dynamic: int | None
    versions: int
    limit: int
    seconds: float

    @property
    def cells(self) -> list[str]:
        """The row as text, under `HEADINGS`."""
        return [
            self.subject,
            self.function,
            " -> ".join(self.values) or "?",
            ", ".join(map(str, self.calls)),
            f"from call {self.dynamic}" if self.dynamic else "no",
            f"{self.versions} of {self.limit}",
            f"{self.seconds:.1f}",
        ]


HEADINGS = ("guard", "in", "values", "calls", "dynamic", "of limit", "seconds")


def story(report: Report) -> list[Row]:
    """Return the table of recompiles, one row for each value of a function, the dearest first.

    A recompile for several values at once has a row for each, and its seconds in the first of them: so the seconds add
    up to those of all recompiles.
    """
    rows: dict[tuple[str, str, str], Row] = {}
    for made in report.recompiles:
        seconds = made.seconds
        for value in made.changed:
            key = (str(made.where), made.function, value.subject)
            row = rows.setdefault(key, Row(value.subject, made.function, [], [], None, 0, made.limit, 0.0))
            row.values = list(dict.fromkeys([*row.values, *filter(None, (value.before, value.now))]))
            row.calls = list(dict.fromkeys([*row.calls, made.call + 1]))
            row.dynamic = row.dynamic or (made.call + 1 if value.dynamic else None)
            row.versions = max(row.versions, min(made.versions + 1, made.limit))
            row.seconds = round(row.seconds + seconds, 3)
            seconds = 0.0
    return sorted(rows.values(), key=lambda row: -row.seconds)


def summary(report: Report) -> str:
    """Return the totals of that table in a sentence."""
    count = len(report.recompiles)
    seconds = sum(made.seconds for made in report.recompiles)
    return f"{count} recompile{'s' * (count != 1)}, {seconds:.1f} s"
