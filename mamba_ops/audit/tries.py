"""Changes that need none of the user's code, such as a flag of Dynamo's: which fit a report, and what they come to."""

import contextlib
import dataclasses
import functools
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mamba_ops.audit import _torch
from mamba_ops.audit.fronts import in_place
from mamba_ops.audit.outcomes import Counts, Try
from mamba_ops.audit.report import Finding, Report

_FLAGS: dict[str, dict[str, Any]] = {  # causes that a flag of torch._dynamo.config may mend, beside those in hints
    "item": {"capture_scalar_outputs": True},
    "tolist": {"capture_scalar_outputs": True},
    "dynamic-shape": {"capture_dynamic_output_shape_ops": True},
    "attribute": {"allow_unspec_int_on_nn_module": True},
    "backward": {"trace_autograd_ops": True},
    "limit": {"recompile_limit": 64},
    "print": {"reorderable_logging_functions": ["builtins:print"]},
    "logging": {
        "ignore_logging_functions": [f"logging:Logger.{name}" for name in ("debug", "info", "warning", "error", "log")]
    },
}
_SIZES = ("size", "size-again", "size-one")  # causes that marked sizes may mend
_DYNAMIC = (*_SIZES, "number", "constant", "limit")  # causes that `dynamic=True` may mend
_NOT_SEEN = ("copy", "jit")  # kinds that a try does not look for
_IN_HINT = re.compile(r"(?:torch\._dynamo\.)?\bconfig\.(\w+)\s*=\s*(True|False)")


@dataclasses.dataclass(frozen=True)
class Tweak:
    """A change that needs none of the code.

    Attributes:
        config: values of torch._dynamo.config; functions in a set are named as in "builtins:print".
        dynamic: whether torch.compile is told `dynamic=True`.
        mark: "dynamic" or "unbacked": sizes that differ between the calls are marked so.
        ours: whether `use_mamba_ops` comes first.
        fronts: whether functions of `mamba_ops.compat` take the place of those that the model imports.
    """

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dynamic: bool = False
    mark: str = ""
    ours: bool = False
    fronts: bool = False

    def __str__(self) -> str:
        parts = [
            f"torch._dynamo.config.{name} = "
            + ("{" + ", ".join(v.rpartition(":")[2] for v in value) + "}" if isinstance(value, list) else str(value))
            for name, value in self.config.items()
        ]
        parts += ["torch.compile(..., dynamic=True)"] if self.dynamic else []
        parts += [f"torch._dynamo.mark_{self.mark} on the sizes that differ"] if self.mark else []
        parts += ["use_mamba_ops(model)"] if self.ours else []
        parts += ["mamba_ops.compat in place of the imported functions"] if self.fronts else []
        return " and ".join(parts) or "no change"

    @property
    def is_ours(self) -> bool:
        """Whether it puts this library under the model, and does nothing else."""
        return self in (Tweak(ours=True), Tweak(fronts=True))

    def __or__(self, other: "Tweak") -> "Tweak":
        return Tweak(
            {**self.config, **other.config},
            self.dynamic or other.dynamic,
            self.mark or other.mark,
            self.ours or other.ours,
            self.fronts or other.fronts,
        )


def tweaks_for(report: Report, *, ours: bool = True, script: bool = False) -> list[tuple[Tweak, tuple[str, ...]]]:
    """Return the changes that may mend a report's findings, each with the fingerprints of those.

    The order is that of the findings. `use_mamba_ops` comes first where a slow path or a kernel was found, else last:
    it says what the library would change, whatever was found.

    Args:
        report: a finished one.
        ours: whether the target is a model that `use_mamba_ops` can be asked about.
        script: whether it is a script, whose tensors cannot be marked.
    """
    found: list[tuple[Tweak, list[str]]] = []

    def add(tweak: Tweak, finding: Finding) -> None:
        for known, fingerprints in found:
            if known == tweak:
                fingerprints.append(finding.fingerprint)
                return
        found.append((tweak, [finding.fingerprint]))

    for finding in _met(report):
        for config in _configs(finding):
            add(Tweak(config), finding)
        if finding.cause in _DYNAMIC:
            add(Tweak({"assume_static_by_default": False}) if script else Tweak(dynamic=True), finding)
        if finding.cause in _SIZES and not script:
            add(Tweak(mark="unbacked" if finding.cause == "size-one" else "dynamic"), finding)
    tweaks = [(tweak, tuple(dict.fromkeys(fingerprints))) for tweak, fingerprints in found]
    kernels = tuple(finding.fingerprint for finding in _met(report) if finding.kind in ("kernel", "fallback"))
    for tweak in [Tweak(fronts=True)] * any(report.fronts.values()) + [Tweak(ours=True)] if ours else ():
        tweaks.insert(0 if kernels else len(tweaks), (tweak, kernels))
    return tweaks


def _met(report: Report) -> list[Finding]:
    """Return the findings that the calls meet as things are: a try does not look behind breaks."""
    return [finding for finding in report.findings if finding.behind is None]


def _configs(finding: Finding) -> Iterator[dict[str, Any]]:
    """Return the flags that may mend a finding, where this torch has them and they are not set yet."""
    wanted = [_FLAGS[finding.cause]] if finding.cause in _FLAGS else []
    wanted += [{name: value == "True"} for hint in finding.hints for name, value in _IN_HINT.findall(hint)]
    for number, config in enumerate(wanted):
        [(name, value)] = config.items()
        if config not in wanted[:number] and _torch.flag(name) not in (None, value):
            yield config


@contextlib.contextmanager
def applied(tweak: Tweak, fn: Any) -> Iterator[None]:
    """Within the block, the flags of a change are set, and its ops are under the model.

    Raises:
        NotApplicableError: `use_mamba_ops` does not bind this model, or it calls no function that is to be replaced.
    """
    values = {
        name: {pkgutil.resolve_name(one) for one in value} if isinstance(value, list) else value
        for name, value in tweak.config.items()
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_torch.flags(values))
        if tweak.ours:
            from mamba_ops.compat.transformers import use_mamba_ops

            try:
                stack.enter_context(use_mamba_ops(fn))
            except (ValueError, AttributeError) as error:
                raise NotApplicableError(str(error)) from None
        if tweak.fronts and not stack.enter_context(in_place(fn)):
            raise NotApplicableError("the model calls none of those functions")
        yield


class NotApplicableError(ValueError):
    """A change does not fit this model."""


def mark(calls: Sequence[Any], how: str) -> None:
    """Mark the sizes of tensors that differ between calls; a size of 1 can only be marked unbacked."""
    function = _torch.find(f"torch._dynamo.decorators:mark_{how}") or (lambda tensor, dim: None)
    for same in zip(*(_torch.tensors_in(call) for call in calls), strict=False):
        for dim in range(min(tensor.dim() for tensor in same)):
            if len({tensor.shape[dim] for tensor in same}) > 1:
                for tensor in same:
                    if how == "unbacked" or tensor.shape[dim] > 1:
                        function(tensor, dim)


def counted(report: Report, *, repeated: bool) -> Counts:
    """Return what the calls of a report came to; with `repeated` the last one was made once more to take its time."""
    repeated &= len(report.calls) > 1
    rows = report.calls[:-1] if repeated else report.calls
    return Counts(
        graphs=sum(graph.call == 0 for graph in report.graphs),
        breaks=len({event.fingerprint for event in report.events if event.what == "break" and event.call == 0}),
        recompiles=sum(row.recompiles for row in rows),
        seconds=round(sum(row.seconds for row in rows), 2),
        warm=round(report.calls[-1].seconds, 4) if repeated else None,
    )


@dataclasses.dataclass(frozen=True)
class Facts:
    """What calls came to: the counts, the fingerprints of all findings, and those of the compiler's own failures."""

    counts: Counts
    findings: tuple[str, ...]
    failures: tuple[str, ...] = ()

    @classmethod
    def of(cls, report: Report, *, repeated: bool = False) -> "Facts":
        """Return those of a report; `repeated` as for `counted`."""
        failures = tuple(f.fingerprint for f in _met(report) if f.cause == "compiler-error")
        seen = tuple(f.fingerprint for f in _met(report) if f.kind not in _NOT_SEEN)
        return cls(counted(report, repeated=repeated), seen, failures)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Facts":
        """Return what was written as JSON."""
        return cls(Counts(**facts["counts"]), tuple(facts["findings"]), tuple(facts["failures"]))


def outcome(tweak: Tweak, findings: Sequence[str], before: Facts, after: Facts) -> Try:
    """Return what a change came to, from what was found without and with it."""
    gone = tuple(name for name in before.findings if name not in after.findings)
    if set(after.failures) - set(before.findings):
        problem = "the compiler failed"
        return Try(str(tweak), tuple(findings), before.counts, problem=problem, ours=tweak.is_ours)
    return Try(str(tweak), tuple(findings), before.counts, after.counts, gone, ours=tweak.is_ours)


def together(wanted: Sequence[tuple[Tweak, tuple[str, ...]]], tries: Sequence[Try]) -> Tweak | None:
    """Return the changes that mend what they are for, as one: of each finding the first; None if nothing helped."""
    gone = {tried.change: tried.gone for tried in tries if tried.after is not None}
    chosen: dict[str, Tweak] = {}
    for tweak, findings in wanted:
        for name in findings:
            if name in gone.get(str(tweak), ()):
                chosen.setdefault(name, tweak)
    distinct = {str(tweak): tweak for tweak in chosen.values()}
    return functools.reduce(Tweak.__or__, distinct.values()) if distinct else None
