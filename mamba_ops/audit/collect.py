"""Records what torch.compile does while a model runs, as findings.

Torch's public records (`torch._dynamo.explain`, the counters) hold no stack for a break that costs a whole frame and no
guard for a recompile. So the functions of torch that are given these objects are wrapped; where a torch does not have
one of them, its lists are read instead.
"""

import contextlib
import importlib.util
import re
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mamba_ops.audit import _torch
from mamba_ops.audit import graph as graphs
from mamba_ops.audit.hints import hints, link
from mamba_ops.audit.outcomes import Event
from mamba_ops.audit.package_remedies import for_caller
from mamba_ops.audit.remedies import RULES, classify_break, classify_guard, guard_subject, remedy
from mamba_ops.audit.report import CallRow, Finding, Graph, Report
from mamba_ops.audit.source_locations import (
    Layers,
    SourceLocation,
    current_locations,
    function_name,
    is_user_code,
    locations_in_text,
    user_frames,
)
from mamba_ops.ops._triton import _triton


class Collector:
    """Adds to a report what torch.compile does while `listen` is entered."""

    def __init__(self, report: Report, model: Any = None) -> None:
        self.report = report
        self.layers = Layers(model)
        self.call = -1
        self._begin = time.perf_counter()
        self._early = 0  # Triton's compiles before the first call that counts
        self._grown: set[tuple[types.CodeType, str]] = set()
        self._unwrapped: set[str] = set()  # functions that this torch does not have

    def add(
        self,
        cause: str,
        op: str,
        message: str,
        stack: Sequence[SourceLocation],
        *,
        fallback: SourceLocation | None = None,
        **more: Any,
    ) -> Finding:
        """Add a finding of a cause in `remedies.RULES`; it is located at the innermost line of the stack."""
        rule = RULES[cause]
        where = stack[-1] if stack else fallback
        around = [where.source if where else "", message[:500], *(location.function for location in reversed(stack))]
        severity = more.pop("severity", rule.severity)
        sentence = remedy(cause, op, *around)
        if "mamba_ops." not in sentence:  # else an op of ours takes the place of the package's
            sentence = for_caller(rule.kind, cause, op, tuple(stack)) or sentence
        finding = Finding(
            rule.kind,
            cause,
            severity,
            op,
            _sentence(message),
            sentence,
            where,
            tuple(stack),
            layers=self.layers.of(stack or ([fallback] if fallback else [])),
            hints=hints(message),
            link=link(message),
            **more,
        )
        finding = self.report.add(finding)
        if finding.breaks or finding.kind == "recompile":
            what = "break" if finding.breaks else "recompile"
            self._record(what, f"{cause} at {where}" if where else cause, finding.fingerprint)
        return finding

    def _record(self, what: str, text: str, fingerprint: str = "") -> None:
        at = round(time.perf_counter() - self._begin, 3)
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
            self.report.compile_seconds |= _torch.compile_seconds()
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
            }
            self._unwrapped = {name for name, around in wrapped.items() if not _torch.replace(stack, name, around)}
            if torch.accelerator.is_available():  # else nothing records, and Inductor takes a second to load
                _torch.replace(stack, _torch.CUDA_GRAPHS, self._no_capture)
            _hook_triton(stack, self._jit)
            try:
                yield
            except _torch.unsupported_error() as error:  # fullgraph=True: it stops at the first break
                self.unsupported(error)
                raise

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
            guard = _guard(again.guard)
            where = SourceLocation.of(again.file, again.line, function_name(again.function))
            if is_user_code(again.file):
                self.add(classify_guard(guard), guard_subject(guard), guard, (), fallback=where)

    def unsupported(self, error: Any, code: types.CodeType | None = None, skipped: bool = False) -> None:
        """Add a graph break."""
        # A break inside a loop is of type "graph break in loop"; its message begins with that of the break itself.
        message = str(error.msg)
        in_loop = error.gb_type == "graph break in loop"
        gb_type = message.partition("\n")[0] if in_loop else str(error.gb_type or message.partition("\n")[0])
        message = message.partition("*** While handling this graph break")[0]
        stack = user_frames(error.real_stack or ())
        if not stack and code is not None and not is_user_code(code.co_filename):
            return  # code of torch or Triton, which runs after a break in user code
        source = stack[-1].source if stack else ""
        name = classify_break(gb_type, message, source)
        if name == "other-break":  # the type may be that of a context manager around; the heading is the break's own
            name = classify_break(message.partition("\n")[0], message, source)
        fallback = SourceLocation.defined(code) if code else None
        frame = _named(code) if code and skipped else None
        self.add(
            name, _subject(name, message, source), message, stack, fallback=fallback, breaks=True, skipped_frame=frame
        )

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
        self.add(cause, _subject(cause, reason, source), reason, stack, breaks=True)

    def _graph(self, original: Any, output: Any, module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found = graphs.walk(module)
        compiled = original(output, module, *args, **kwargs)  # first: it may send Dynamo back for another attempt
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
        return compiled

    def _recompile(self, original: Any, entries: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        reasons = original(entries, frame, *args, **kwargs)
        if args[1:2] == (True,) or kwargs.get("skip_logging") or not reasons:
            return reasons
        code = frame.f_code
        if 0 <= self.call < len(self.report.calls):
            self.report.calls[self.call].recompiles += 1
        text = str(reasons[0])
        guard = _guard(text)
        cause, subject = classify_guard(guard), guard_subject(guard)
        if cause == "size-one" and (_size_now(guard, frame) or 0) > 1:  # beyond the other end of the range
            cause = "size-again"
        key = code, subject
        if cause == "size" and key in self._grown:
            cause = "size-again"
        self._grown.add(key)
        if not is_user_code(code.co_filename):
            return reasons
        if _count(entries) >= _torch.recompile_limit():
            cause = "limit"
            subject = _named(code)
        definition = SourceLocation.defined(code)
        if not self.layers.of((definition,)):  # the wrapper that a decorator made
            definition = self.layers.forward or definition
        stack = () if cause in ("size", "size-one") else _guard_stack(text, code)
        self.add(cause, subject, guard, stack, fallback=definition)
        return reasons

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
            _hook_triton(stack, self._jit)
            yield


def _guard(text: str) -> str:
    """Return the guard that failed, as an expression, from torch's text of it."""
    text = re.sub(r"^\d+/\d+(?:_\d+)?: ", "", text)
    text = re.sub(r"\bkwargs\['(\w+)'\]", r"\1", text)
    return re.split(r"\s+# |\n", text)[0].strip()


def _named(code: types.CodeType) -> str:
    """Return a function's name, and the line after which it begins where Dynamo compiled the rest of one."""
    name = str(getattr(code, "co_qualname", code.co_name))  # Python 3.10 has no qualified name here
    after = re.search(r"torch_dynamo_resume_in_\w+_at_(\d+)", name)
    return function_name(name) + (f" after line {after[1]}" if after else "")


def _count(entries: Any) -> int:
    """Return how many versions of a function there are; torch 2.13 keeps a list of them, 2.11 a chain."""
    if isinstance(entries, Sequence):
        return len(entries)
    count = 0
    while entries is not None:
        count, entries = count + 1, entries.next
    return count


def _size_now(guard: str, frame: Any) -> int | None:
    """Return the size in this call for which a guard on `x.size()[0]` failed."""
    found = re.search(r"[\w.\[\]']+\.size\(\)\[\d+\]", guard)
    with contextlib.suppress(Exception):  # not every source is an expression
        return int(eval(found[0], {}, dict(frame.f_locals))) if found else None
    return None


def _guard_stack(text: str, code: types.CodeType) -> tuple[SourceLocation, ...]:
    """Return where the value in a guard was used; the guard's comment holds that, with the end of the file's path."""
    if stack := locations_in_text(text):
        return stack
    for ending, line, name in re.findall(r"# .*# (\S+\.py):(\d+) in (\S+)", text):
        modules = (getattr(module, "__file__", None) or "" for module in list(sys.modules.values()))
        for file in (code.co_filename, *modules):
            if file.endswith(ending) and is_user_code(file):
                return (SourceLocation.of(file, int(line), function_name(name)),)
    return ()


def _sentence(message: str) -> str:
    """Shorten torch's message to its heading and its explanation."""
    message = re.sub(r" at 0x[0-9a-f]+", "", message)  # addresses differ from run to run
    message = re.sub(r"\.pybind11_detail_\w+", "", message)  # the prefix of functions of pybind11
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    explained = [line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")]
    heading = lines[0] if lines else ""
    return f"{heading}: {explained[0]}" if explained and explained[0] != "Explanation:" else heading


def _subject(cause: str, message: str, source: str) -> str:
    """Return the function or op that a break is about."""
    patterns = {
        "item": r"call_method \S+ (item)\b",
        "dynamic-shape": r"`(aten\.\w+)",
        "no-fake": r"unsupported operator: ([\w:.]+)|`([\w:.]+)`",
        "disable": r"<(?:bound method|function) ([\w.]+)",
        "builtin": r"builtin `([\w.]+?)\.?`|builtin (?:operator )?`?([\w.]+)",
    }
    fallback = r"<built-in (?:method|function) (\w+)|<(?:function|bound method) ([\w.]+)|call_function ([\w.]+)"
    for pattern in (patterns.get(cause), fallback):
        if pattern and (found := re.search(pattern, message)):
            name = next(group for group in found.groups() if group)
            return f".{name}()" if cause in ("item", "tolist") else name
    called = re.search(r"([\w.]+)\(", source)
    if entered := re.search(r"\bwith ([\w.]+)", source):
        return entered[1]
    return {"branch": "if"}.get(cause) or (called[1] if called else cause)


def _hook_triton(stack: contextlib.ExitStack, on_compile: Callable[[str], None]) -> None:
    """Call `on_compile` with the kernel's name after each compile, where Triton is installed."""

    def compiled(*_: Any, **kwargs: Any) -> None:
        function = kwargs.get("fn")
        name = getattr(function, "name", None) or str(kwargs.get("repr", "a kernel"))
        if not name.rpartition(".")[2].startswith("triton_"):  # those are Inductor's own
            on_compile(name.rpartition(".")[2])

    if importlib.util.find_spec("triton") is not None:
        stack.enter_context(_triton.hook(_triton.COMPILED, compiled, "the audit does not see what Triton compiles"))
