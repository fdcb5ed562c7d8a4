"""One eager call: what ops do that their schemas do not say, waits for the device, and slow paths taken in silence."""

import contextlib
import itertools
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from mamba_ops.audit import _torch, absent
from mamba_ops.audit.graph import op_name
from mamba_ops.audit.source_locations import current_locations
from mamba_ops.registry import Explanation, Op, backends, explain, ops, record_selections

if TYPE_CHECKING:
    from mamba_ops.audit.collect import Collector

_BUILT_IN = (
    "aten",
    "prim",
    "prims",
    "quantized",
    "inductor",
    "_c10d_functional",
    "c10d",
    "profiler",
    "mkldnn",
    "sparse",
)
_SYNCS = {"aten._local_scalar_dense.default": "item", "aten.nonzero.default": "dynamic-shape"}
_SLOW = re.compile(r"fast[ -]path|falling back|fallback|slower|naive|sequential implementation", re.IGNORECASE)
_MISSING = re.compile(r"install|not available|unavailable|could not be|failed to load|is None", re.IGNORECASE)


class _Watch:
    """Runs ops: compares what ops of other packages do with their schemas, and records where the host waits."""

    def __init__(self, collector: "Collector", absent_device: str | None) -> None:
        self.collector = collector
        self.absent_device = absent_device
        self.syncs: list[tuple[str, tuple[Any, ...]]] = []
        self.own_ops = {op.qualname: op for op in ops().values()}
        self.choices: dict[str, list[Explanation]] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op, and return what it returns."""
        if (cause := _SYNCS.get(str(func))) is not None:
            self.syncs.append((cause, current_locations()))
        if func.namespace in _BUILT_IN:
            return func(*args, **kwargs)
        schema = _torch.schema(func)
        if schema is None:
            return func(*args, **kwargs)
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        if (op := self.own_ops.get(op_name(func))) is not None:
            self._explain(op, given)
            return func(*args, **kwargs)
        return self._compare_with_schema(func, schema, given, lambda: func(*args, **kwargs))

    def _explain(self, op: Op[...], given: dict[str, Any]) -> None:
        """Record which backend takes a call; a refusal by a faster backend of the device is a finding."""
        given.pop("selection", None)
        if "output" in given:
            given["out"] = given.pop("output")
        # A cache left out is an empty tensor at the op.
        given = {n: v for n, v in given.items() if not (n in op.mutates and isinstance(v, Tensor) and v.shape == (0,))}
        with contextlib.suppress(Exception):  # a call that `explain` cannot read says nothing about the model
            if self.absent_device:
                given = absent.fake(given, self.absent_device)
            choice = explain(op, **given)
            self.choices.setdefault(op.name, []).append(choice)
            device = next(value.device.type for value in given.values() if isinstance(value, Tensor))
            faster = itertools.takewhile(lambda backend: backend.name != choice.backend, backends())
            for backend in faster if choice.bound_by is None else ():
                reason = choice.reasons.get(backend.name)
                if reason and (backend.devices is None or device in backend.devices):
                    message = f"{backend.name} does not take it: {reason}; {choice.backend} runs"
                    self.collector.add("refusal", op.name, message, current_locations())

    def _compare_with_schema(self, func: Any, schema: Any, given: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Return the result of a call; writes and aliases that the schema does not declare are findings."""
        declared = {a.name for a in schema.arguments if a.alias_info is not None}
        constant = {name: value for name, value in given.items() if name not in declared and isinstance(value, Tensor)}
        before = {name: value.detach().clone() for name, value in constant.items()}
        result = call()
        name = op_name(func)
        for argument, value in constant.items():
            if not _same(before[argument], value):
                message = f"writes to {argument}, which its schema does not say"
                self.collector.add("hidden-mutation", name, message, current_locations())
        memory = {_key(value): argument for argument, value in constant.items() if value.numel()}
        for out in _torch.tensors_in(result):
            if out.numel() and (source := memory.get(_key(out))):
                message = f"returns memory of {source}, which its schema does not say"
                self.collector.add("alias", name, message, current_locations())
        return result


def _key(tensor: Tensor) -> int:
    return _torch.storage_key(tensor.untyped_storage())


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() or a.is_complex():
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    return torch.equal(a, b)


@contextlib.contextmanager
def hear_fallbacks(collector: "Collector", *, compiled: bool) -> Iterator[None]:
    """Within the block, warnings of Transformers and others about slow paths become findings.

    Transformers gives each warning once in a process. Within the block it gives it in every call, so that it is found
    for each layer, and in a second audit too.
    """

    def add_slow_path(message: str) -> None:
        if not (_SLOW.search(message) and _MISSING.search(message)):
            return
        loggers = ("hub_kernels.py", "/utils/logging.py", "/logging/__init__.py")
        stack = tuple(location for location in current_locations() if not location.file.endswith(loggers))
        names = re.findall(r"`([\w./-]+)`", message)
        missing = re.search(r"`([\w.-]+)` is not installed|install `?([\w.-]+)`?", message)
        package = next((group for group in missing.groups() if group), "") if missing else ""
        cause = "reference-path" if "reference" in message else "optional-package"
        collector.add(cause, package or (names[0] if names else "the package named"), message, stack)

    def call_handlers(log: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            add_slow_path(record.getMessage())
        passed_on(log, record)

    def warn(message: Any, *args: Any, **kwargs: Any) -> None:
        add_slow_path(str(message))
        warned(message, *args, **kwargs)

    passed_on, warned = logging.Logger.callHandlers, warnings.warn
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(logging.Logger, "callHandlers", call_handlers))
        if hasattr(logging.Logger, "warning_once"):
            once = lambda self, message, *rest, **more: add_slow_path(str(message))  # noqa: E731
            stack.enter_context(mock.patch.object(logging.Logger, "warning_once", once))
        if not compiled:  # Dynamo traces this very function, and no other
            stack.enter_context(mock.patch.object(warnings, "warn", warn))
        yield


def run_eagerly(
    collector: "Collector", call: Callable[[], Any], absent_device: str | None = None
) -> list[tuple[str, tuple[Any, ...]]]:
    """Run one call eagerly; return where the host waited, each as a cause and a stack.

    Args:
        collector: where findings are added.
        call: makes the call.
        absent_device: the device for which backends of our ops are chosen, if the call runs on another.
    """
    watch = _Watch(collector, absent_device)
    with (
        hear_fallbacks(collector, compiled=False),
        record_selections() as record,
        _torch.intercept_ops(watch.run),
    ):
        call()
    if absent_device:
        ran = [(name, choice.backend) for name, choices in watch.choices.items() for choice in choices]
    else:  # ops inside a composed op too
        ran = [(selection.op.rpartition("::")[2], selection.backend) for selection in record]
    for name in dict(ran):
        counts = Counter(str(backend) for op, backend in ran if op == name)
        summary = [f"{backend} ({count})" for backend, count in counts.items()]
        reasons = {f"{n}: {why}" for choice in watch.choices.get(name, ()) for n, why in choice.reasons.items()}
        collector.report.backends[name] = "; ".join([", ".join(summary), *sorted(reasons)])
    return watch.syncs


def add_hidden_syncs(collector: "Collector", syncs: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
    """Add the waits inside calls that Dynamo did not trace; in traced code it finds them itself."""
    broken = {
        finding.where
        for finding in collector.report.findings
        if finding.breaks and finding.cause in ("disable", "pybind", "skipped-function")
    }
    for cause, stack in syncs:
        above = [i for i, location in enumerate(stack) if location in broken]
        if above and above[-1] < len(stack) - 1:
            source = stack[-1].source
            cause = "tolist" if ".tolist(" in source else "branch" if source.startswith(("if ", "while ")) else cause
            op = {"item": "item", "tolist": "tolist", "branch": "if"}.get(cause, cause)
            collector.add(cause, op, "waits for the device, unseen by the compiler", stack)
