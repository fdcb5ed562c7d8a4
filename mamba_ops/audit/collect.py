"""Records what torch.compile does while a model runs, as findings.

Torch's public records (`torch._dynamo.explain`, the counters) hold no stack for a break that costs a whole frame and no
guard for a recompile. So the functions of torch that are given these objects are wrapped; where a torch does not have
one of them, its lists are read instead.
"""

import contextlib
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mamba_ops.audit import _torch, triton_compiles
from mamba_ops.audit import graph as graphs
from mamba_ops.audit.expressions import called_at
from mamba_ops.audit.guards import classify_guard, guard_subject, guard_text
from mamba_ops.audit.messages import hints, link, sentence, subject_of
from mamba_ops.audit.outcomes import CallRow, ChangedValue, Event, Graph, Recompile
from mamba_ops.audit.package_remedies import for_caller
from mamba_ops.audit.recompiles import Recompiles, named
from mamba_ops.audit.remedies import RULES, classify_break, remedy
from mamba_ops.audit.report import Finding, Report
from mamba_ops.audit.show import grouped
from mamba_ops.audit.source_locations import (
    Layers,
    SourceLocation,
    called_from,
    current_locations,
    function_name,
    is_user_code,
    locations_in_text,
    user_frames,
)

Stack = tuple[SourceLocation, ...]


class Collector:
    """Adds to a report what torch.compile does while `listen` is entered."""

    def __init__(self, report: Report, model: Any = None, *, watches: bool = False) -> None:
        """`watches`: whether the code calls torch.compile itself, so that nobody makes a failed call once more,
        and calls are not ours to tell apart.
        """
        self.watches = watches
        self._tell: Callable[[], None] = lambda: None
        self.report = report
        self.layers = Layers(model)
        self._model = model
        self._bound: set[str] | None = None  # the files of the model that use_mamba_ops changes
        self.call = -1
        self._since = time.perf_counter()
        self._failures: list[tuple[Exception, Stack, Stack, SourceLocation]] = []  # that are no findings yet
        self._early = 0  # Triton's compiles before the first call that counts
        self.recompiles = Recompiles(self)
        self.broken: list[tuple[Finding, Sequence[SourceLocation]]] = []  # each break with its stack
        self._unwrapped: set[str] = set()  # functions that this torch does not have

    def begin_anew(self, report: Report, tell: Callable[[], None]) -> None:
        """Go on in another report, as a new process does; `tell` is called whenever something was added to it."""
        self.report, self._tell, self.call = report, tell, len(report.calls) - 1
        self._since = time.perf_counter()
        self._failures.clear()

    def add(
        self,
        cause: str,
        op: str,
        message: str,
        stack: Sequence[SourceLocation],
        *,
        callers: tuple[SourceLocation, ...] = (),
        fallback: SourceLocation | None = None,
        **more: Any,
    ) -> Finding:
        """Add a finding of a cause in `remedies.RULES`; it is located at the innermost line of the stack.

        Without one it is located at the fallback. `callers` are the calls in Python that led to what Dynamo traced.
        """
        rule = RULES[cause]
        where = stack[-1] if stack else fallback
        around = [where.source if where else "", message[:500], *(location.function for location in reversed(stack))]
        severity = more.pop("severity", rule.severity)
        calls = called_from(callers, tuple(stack))
        mended = remedy(cause, op, *around, binds=self._is_bound(cause, stack))
        if stack and "mamba_ops." not in mended:  # else an op of ours takes the place of the package's
            mended = for_caller(rule.kind, cause, op, calls) or mended
        finding = Finding(
            rule.kind,
            cause,
            severity,
            op,
            sentence(message),
            _first_of(more.get("mend_first"), mended),
            where,
            calls,
            layers=self.layers.of(stack or ([fallback] if fallback else [])),
            hints=hints(message),
            link=link(message),
            **more,
        )
        kept = self.report.add(finding)
        if finding.breaks:
            self.broken.append((kept, tuple(stack)))
            self._record("break", f"{cause} at {where}" if where else cause, kept.fingerprint)
        self._tell()
        return kept

    def _is_bound(self, cause: str, stack: Sequence[SourceLocation]) -> bool:
        """Whether `use_mamba_ops` changes the code of a finding about a slow path: the model itself is asked."""
        if self._bound is None and cause == "reference-path":
            self._bound = _bound_files(self._model)
        return any(location.file in (self._bound or ()) for location in stack)

    def _record(self, what: str, text: str, fingerprint: str = "") -> None:
        at = round(time.perf_counter() - self._since, 3)
        self.report.events.append(Event(what, max(self.call, 0), _torch.compile_id(), at, text, fingerprint))

    @contextlib.contextmanager
    def one_call(self, shapes: str) -> Iterator[CallRow]:
        """Within the block, count what torch.compile does as one call of the model."""
        self.call += 1
        row = CallRow(shapes, jit=self._early)
        self._early = 0
        self.report.calls.append(row)
        start, graph_count = time.perf_counter(), 0
        if self._unwrapped:
            graph_count = _torch.graph_count()
            _torch.forget_compiles()
        try:
            yield row
        finally:
            row.seconds = round(time.perf_counter() - start, 3)
            self.recompiles.settle()
            if self._unwrapped:
                self._read_lists(row, _torch.graph_count() - graph_count)

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Within the block, wrap the functions of torch that report what torch.compile does."""
        with contextlib.ExitStack() as stack:
            wrapped: dict[str, Callable[..., Any]] = {
                _torch.BREAKS: self._break,
                _torch.GRAPHS: self._graph,
                _torch.RECOMPILES: self._recompile,
                _torch.FAILURES: self._failure,
            }
            self._unwrapped = {name for name, around in wrapped.items() if not _torch.replace(stack, name, around)}
            if torch.accelerator.is_available():  # else nothing records, and Inductor takes a second to load
                _torch.replace(stack, _torch.CUDA_GRAPHS, self._no_capture)
            triton_compiles.hook(stack, self._jit)
            stack.enter_context(_torch.on_compile(self._begin, self._end))
            yield

    def _begin(self, trigger: str, compile_id: str) -> None:
        if trigger == "DYNAMO":
            self.recompiles.begin_compile(compile_id)

    def _end(self, trigger: str, compile_id: str) -> None:
        if trigger == "DYNAMO":
            self.recompiles.end_compile(compile_id)

    def _read_lists(self, row: CallRow, graph_count: int) -> None:
        """Add what the functions that could not be wrapped would have reported of a call."""
        breaks, recompiles = _torch.compiles()
        if _torch.GRAPHS in self._unwrapped:
            row.graphs += graph_count
            self.report.graphs += [Graph(self.call, "?", 0) for _ in range(graph_count)]
        for broken in breaks if _torch.BREAKS in self._unwrapped else ():
            self._add_break(broken.reason, user_frames(broken.stack))
        for again in recompiles if _torch.RECOMPILES in self._unwrapped else ():
            row.recompiles += 1
            guard = guard_text(again.guard)
            where = SourceLocation.of(again.file, again.line, function_name(again.function))
            cause, subject, limit = classify_guard(guard), guard_subject(guard), _torch.recompile_limit()
            changed = (ChangedValue(subject),)
            self.report.recompiles.append(
                Recompile(self.call, "?", again.function, where, changed, 1, limit, cause=cause)
            )
            if is_user_code(again.file):
                self.add(cause, subject, guard, (), fallback=where)

    def unsupported(self, error: Any, code: types.CodeType | None = None, skipped: bool = False) -> None:
        """Add a graph break."""
        # A break inside a loop is of type "graph break in loop"; its message begins with that of the break itself.
        message = str(error.msg)
        in_loop = error.gb_type == "graph break in loop"
        gb_type = message.partition("\n")[0] if in_loop else str(error.gb_type or message.partition("\n")[0])
        message = message.partition("*** While handling this graph break")[0]
        callers, stack = current_locations(), user_frames(error.real_stack or ())
        if not stack and code is not None and not is_user_code(code.co_filename):
            self._break_in_torch(code, message, callers)
            return
        source = stack[-1].source if stack else ""
        name = classify_break(gb_type, message, source)
        if name == "other-break":  # the type may be that of a context manager around; the heading is the break's own
            name = classify_break(message.partition("\n")[0], message, source)
        fallback = SourceLocation.defined(code) if code else None
        frame = named(code) if code and skipped else None
        op = subject_of(name, message, source, called_at(error.real_stack[-1] if stack else None))
        finding = self.add(
            name, op, message, stack, callers=callers, fallback=fallback, breaks=True, skipped_frame=frame
        )
        if frame:
            self.recompiles.add_break(finding)

    def _break_in_torch(self, code: types.CodeType, message: str, callers: tuple[SourceLocation, ...]) -> None:
        """Add a graph break in a frame of torch's own, at the line of the user's code that called it."""
        known = {finding.where for finding in self.report.findings if finding.breaks}
        if callers and callers[-1] in known:
            return  # what is called there was left to Python already
        cause = classify_break(message.partition("\n")[0], message, "")
        if cause == "explicit":
            cause = "explicit-of-torch"
        self.add(cause, named(code), message, callers, fallback=SourceLocation.defined(code), breaks=True)

    def _break(self, original: Any, translator: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand in for `log_graph_break(self, code_options, reason, exc)`."""
        given = dict(zip(("code_options", "reason", "exc"), args, strict=False)) | kwargs
        reason, error = str(given["reason"]), given["exc"]
        if getattr(error, "logged", False):
            pass
        elif isinstance(error, _torch.unsupported_error()):
            skipped = error.skip_frame or "Skipping the function" in reason or error.gb_type == "graph break in loop"
            self.unsupported(error, translator.f_code, skipped)
        else:
            self._add_break(reason, user_frames(getattr(error, "real_stack", None) or _torch.traced_stack()))
        return original(translator, *args, **kwargs)

    def _add_break(self, reason: str, stack: Sequence[SourceLocation]) -> None:
        """Add a graph break of which the reason alone is known, not Dynamo's type of it."""
        source = stack[-1].source if stack else ""
        cause = classify_break(reason.partition("\n")[0], reason, source)
        self.add(cause, subject_of(cause, reason, source), reason, stack, callers=current_locations(), breaks=True)

    def _failure(self, original: Any, error: Exception, code: types.CodeType, *args: Any, **kwargs: Any) -> Any:
        """Stand in for `exception_handler(e, code, frame, export)`, through which each failed compile goes."""
        stack = user_frames(getattr(error, "real_stack", None) or ())
        if isinstance(error, _torch.unsupported_error()):
            if not getattr(error, "logged", False) and "recompile limit" not in str(error.gb_type):
                self.unsupported(error, code)  # fullgraph=True: it stops at the first break
        else:
            self._failures.append((error, stack, current_locations(), SourceLocation.defined(code)))
            if self.watches and type(error).__name__ != "TorchRuntimeError":  # of an op: it fails in Python too
                self.add_failures()
        return original(error, code, *args, **kwargs)

    def add_failures(self, raised: Exception | None = None) -> None:
        """Add the errors of Dynamo, AOTAutograd and backends since the last call of this, each once.

        Args:
            raised: what reached the caller, if anything did.
        """
        for error, stack, callers, fallback in self._failures:
            name = type(error).__name__
            said = " ".join(str(error).split("\n")[:2])  # a backend's error stands in the second line
            self.add(
                "compiler-error",
                name,
                f"{name}: {said}",
                stack or callers,
                callers=callers if stack else (),
                fallback=fallback,
                breaks=True,
            )
        if raised is not None and not self._failures:  # it came when the compiled code ran
            stack = user_frames(getattr(raised, "real_stack", None) or ()) or locations_in_text(str(raised))
            self.add("compiler-error", type(raised).__name__, str(raised), stack, breaks=True)
        self._failures.clear()

    def _graph(self, original: Any, output: Any, module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found = graphs.walk(module)
        compiled = original(output, module, *args, **kwargs)  # first: it may send Dynamo back for another attempt
        self.recompiles.add_graph(output, module, _torch.compile_id())
        inside = self.layers.path((getattr(output, "local_scope", None) or {}).get("self"))
        segments = graphs.segments(module, self.layers, inside)
        ops = sum(segment.ops for segment in segments)
        self.report.graphs.append(Graph(max(self.call, 0), _torch.compile_id(), ops, segments))
        self._record("graph", f"{ops} op{'s' * (ops != 1)}")
        if 0 <= self.call < len(self.report.calls):
            self.report.calls[self.call].graphs += 1
        for cause, op, message, stack in found:
            self.add(cause, op, message, stack)
        if not self.report.device.startswith("cpu"):
            for cause, op, message, stack in graphs.mutated_inputs(module):
                self.add(cause, op, message, stack, severity="note", needs_device=True)
        self._tell()
        return compiled

    def _recompile(self, original: Any, entries: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        reasons = original(entries, frame, *args, **kwargs)
        if args[1:2] == (True,) or kwargs.get("skip_logging") or not reasons:
            return reasons
        if 0 <= self.call < len(self.report.calls):
            self.report.calls[self.call].recompiles += 1
        self.recompiles.begin(reasons, _listed(entries), frame)
        return reasons

    def assumption(self, op: str) -> None:
        """Add that Python asked for values between two graphs of an absent device: they were taken to be 1."""
        message = f"{op} asked for values, which are not here: they were taken to be 1, and the trace went on"
        self.add(
            "assumed-values",
            op.removeprefix("aten.").partition(".")[0],
            message,
            current_locations(),
            needs_device=True,
        )

    def stop(self, why: str) -> None:
        """Add a call that could not be traced to its end, with the layers that nothing was seen of."""
        missed = self.layers_not_reached()
        unseen = f"; not reached: {grouped(missed)}" if missed else ""
        self.add("needs-values", "fake tensor", f"{why}{unseen}", (), needs_device=True)

    def layers_not_reached(self) -> tuple[str, ...]:
        """Return the layers with parameters of which no graph has an op."""
        seen = {layer for graph in self.report.graphs for segment in graph.segments for layer in segment.layers}
        return tuple(layer for layer in self.layers.with_parameters if layer not in seen)

    def _no_capture(self, original: Any, message: str) -> None:
        reason = message.removeprefix("skipping cudagraphs due to ").partition(". Found from")[0]
        causes = {"capture-input": "mutated inputs", "capture-host": "cpu device|multiple devices"}
        cause = next((cause for cause, words in causes.items() if re.match(words, reason)), "capture-other")
        op = "the input" if cause == "capture-input" else reason
        self.add(cause, op, f"no CUDA graph: {reason}", locations_in_text(message))
        original(message)

    def _jit(self, name: str) -> None:
        call = max(self.call, 0)  # the eager call has the shapes of the first one
        if call < len(self.report.calls):
            self.report.calls[call].jit += 1
        else:
            self._early += 1
        cause = "jit-later" if call else "jit-first"
        self.add(cause, name, f"Triton compiled it in call {call + 1}", current_locations())

    @contextlib.contextmanager
    def listen_to_triton(self) -> Iterator[None]:
        """Within the block, count Triton's compiles alone."""
        with contextlib.ExitStack() as stack:
            triton_compiles.hook(stack, self._jit)
            yield


def _bound_files(model: Any) -> set[str]:
    """Return the files of a model's mixers whose functions `use_mamba_ops` binds."""
    from mamba_ops.compat.transformers import use_mamba_ops

    if not isinstance(model, torch.nn.Module):
        return set()
    try:
        with use_mamba_ops(model) as binding:
            return {str(sys.modules[name.rpartition(".")[0]].__file__) for name in binding.bound}
    except ValueError:  # it has no such mixers
        return set()


def _first_of(broken: str | None, sentence: str) -> str:
    return f"Mend the graph break at {broken}, first: this follows from it. Then: {sentence}" if broken else sentence


def _listed(entries: Any) -> Sequence[Any]:
    """Return the versions of a function; torch 2.13 keeps a list of them, 2.11 a chain."""
    if isinstance(entries, Sequence):
        return entries
    found = []
    while entries is not None:
        found.append(entries)
        entries = entries.next
    return found
