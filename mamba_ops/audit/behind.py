"""What stands behind a break, and is not seen until that break is mended.

After a break in the middle of a loop, a `try`, a `with` or a generator Dynamo gives the whole function up, and runs it
in Python; after an error of the compiler it stops. What else is wrong there is not looked at. Here the same calls are
made once more: Dynamo breaks in loops as it does elsewhere, the other statements are taken apart (`taken_apart`), and a
call at which the compiler fails is left to Python as one. That is right, and slow: each turn of a loop is compiled for
itself. So it is done for the findings alone, until nothing new comes, within a time.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import nn

from mamba_ops.audit import _torch
from mamba_ops.audit.collect import Collector
from mamba_ops.audit.guards import classify_guard, guard_subject, guard_text
from mamba_ops.audit.report import Finding, Report
from mamba_ops.audit.source_locations import SourceLocation, guard_location
from mamba_ops.audit.taken_apart import Place, places_of, take_apart

_SECONDS = 20.0  # at least, for the compiles of this; more where the calls themselves took longer
# What Dynamo cannot carry from one turn of a loop to the next, and recompiles because there are several turns.
_OF_THE_METHOD = re.compile(r"econstruct|iterator|resume|graph break in loop", re.IGNORECASE)
_VALUES = ("constant", "flag", "number", "string")
_ACROSS_CALLS = ("attribute", "keys", "length", *_VALUES)


class Probe(Collector):
    """Collects what the calls show with breaks in loops; its report is its own."""

    def __init__(self, model: Any, device: str) -> None:
        super().__init__(Report("behind", device), model)
        self._of_turns: set[str] = set()  # what differs from one turn of a loop to the next

    def _recompile(self, original: Any, entries: Any, frame: Any, *args: Any, **kwargs: Any) -> Any:
        """Add attributes that changed between two calls: within one call, turns of a loop recompile."""
        reasons = original(entries, frame, *args, **kwargs)
        for text in map(str, reasons):
            guard = guard_text(text)
            cause, subject = classify_guard(guard), guard_subject(guard)
            attribute = re.match(r"(\w+)[.\[]", subject)
            if attribute is None or cause not in _ACROSS_CALLS or _OF_THE_METHOD.search(guard):
                continue
            if self.call == 0:
                self._of_turns.add(subject)
            elif subject not in self._of_turns or self._is_no_layer(frame.f_locals.get(attribute[1])):
                stack, defined = guard_location(text, frame.f_code), SourceLocation.defined(frame.f_code)
                self.add("attribute" if cause in _VALUES else cause, subject, guard, stack, fallback=defined)
        return reasons

    def _is_no_layer(self, value: Any) -> bool:
        """Return whether a value is a module of the model, and none of a list, which a loop runs through."""
        is_in_list = any(part.isdigit() for part in self.layers.path(value).split("."))
        return isinstance(value, nn.Module) and not is_in_list


class _TimeIsOverError(BaseException):
    """Ends the calls that `_end_compiles` was told to end; no handler of Dynamo's or the user's stops it."""


def _end_compiles(stack: contextlib.ExitStack, seconds: float) -> None:
    """Until the stack closes, a graph that is made after this time raises _TimeIsOverError."""
    end = time.monotonic() + seconds

    def make(original: Any, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() > end:
            raise _TimeIsOverError
        return original(*args, **kwargs)

    _torch.replace(stack, _torch.GRAPHS, make)


@contextlib.contextmanager
def going_on(seconds: float) -> Iterator[None]:
    """Within the block, Dynamo goes on after breaks in loops and failed calls; it ends early when the time is over."""
    without_limits = dict.fromkeys(("recompile_limit", "accumulated_recompile_limit"), 10_000)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch.patched(_torch.LOOPS, lambda translator: False))
        for container in (nn.ModuleList, nn.Sequential):
            stack.enter_context(mock.patch.object(container, "__iter__", _iterate))
        stack.enter_context(_torch.flags(without_limits))
        _torch.replace(stack, _torch.CALLS, _leave_to_python)
        with contextlib.suppress(_TimeIsOverError):
            _end_compiles(stack, seconds)
            yield


def _leave_to_python(original: Any, translator: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand in for `call_function(self, fn, args, kwargs)`: where that fails, the graph ends before it."""
    try:
        return original(translator, *args, **kwargs)
    except Exception as error:
        if not _torch.is_compiler_error(error):
            raise
        _torch.end_graph(error)


def _iterate(modules: Any) -> Iterator[nn.Module]:
    """Stand in for the iterator over a dict that torch gives: Dynamo cannot carry that one from turn to turn."""
    return iter(tuple(modules._modules.values()))


def look(collector: Collector, probe: Probe, make_calls: Callable[[], None]) -> None:
    """Make the calls again and again, and add what is new to the collector's report, as behind what hid it.

    Args:
        collector: of the audit.
        probe: is called by what `make_calls` compiles anew each time.
        make_calls: compiles the model, and makes the calls.
    """
    report = collector.report
    end = time.monotonic() + max(_SECONDS, sum(row.seconds for row in report.calls))
    apart: set[Place] = set()
    with contextlib.ExitStack() as stack:
        while time.monotonic() < end:
            places = {
                place
                for finding in (*report.findings, *probe.report.findings)
                if finding.hides
                for place in places_of(finding.stack)
            }
            is_new = take_apart(stack, places - apart)
            if probe.call >= 0 and not is_new:
                break
            apart |= places
            probe.call = -1
            with contextlib.suppress(Exception), probe.listen(), going_on(end - time.monotonic()):
                make_calls()  # of calls that fail the report speaks already
    hiding = [number for number, finding in enumerate(report.findings, 1) if finding.hides]
    known = {finding.key for finding in report.findings}
    broken = {str(finding.where) for finding in report.findings if finding.breaks}
    for finding in probe.report.findings:
        at_known_line = finding.breaks and str(finding.where) in broken
        raised = bool(apart) and finding.cause == "exception"  # nobody handles it here
        if finding.key in known or at_known_line or raised or _OF_THE_METHOD.search(finding.message):
            continue
        finding.behind = next((n for n in hiding if _hides(report.findings[n - 1], finding)), hiding[0])
        report.add(finding)


def _hides(hiding: Finding, finding: Finding) -> bool:
    """Return whether a finding is in the function that another one made Dynamo give up."""
    function = (hiding.skipped_frame or "").partition(" after line ")[0].rpartition(".")[2]
    given_up = [location for location in hiding.stack if not function or location.function == function]
    return any((a.file, a.function) == (b.file, b.function) for a in given_up for b in finding.stack)
