"""Which kernel runs a call, and why not the others."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mamba_ops.registry import capture, errors, layouts
from mamba_ops.registry.dispatcher import device_of, dispatcher
from mamba_ops.registry.snapshot import Snapshot

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.decision_cache import DecisionCache
    from mamba_ops.registry.op import Op


class Selection(NamedTuple):
    """One run of an op, as `record_selections` saw it."""

    op: str
    backend: str


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run on, and why not on the others.

    Attributes:
        op: qualified name.
        backend: the backend that would run, or None if no backend takes the call.
        bound_by: what asked for it by name ("use_backend", an environment variable), or None for the default order.
        reasons: backend name to the sentence why it would not run.
    """

    op: str
    backend: str | None
    bound_by: str | None
    reasons: Mapping[str, str]

    def __str__(self) -> str:
        rows = [(self.backend, f"runs ({self.bound_by or 'default order'})")] if self.backend else []
        rows += self.reasons.items()
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([self.op, *(f"  {name:<{width}}  {reason}" for name, reason in rows)])


_warned: set[tuple[str, str]] = set()


def generation() -> int:
    """Return the number of what is selected here: it changes whenever another kernel may be chosen than before, and is
    the earlier one again after a swap back.
    """
    return dispatcher.current().generation


def settings() -> Mapping[str, Hashable]:
    """Return the settings in this context: those of `use_backend` or `configure`, else the environment's."""
    return dispatcher.current().settings


def prewarm() -> None:
    """Look at what every decision asks first, so that the next call need not."""
    dispatcher.load_entry_points()
    snapshot = dispatcher.current()
    has_explicit_backend()
    for op in dispatcher.ops.values():
        snapshot.order(op)


def has_explicit_backend(*ops: "Op[...]") -> bool:
    """Return whether backends are asked for by name for any of these ops: only then may `check_supported` raise."""
    snapshot = dispatcher.current()
    return snapshot.names_backends and any(snapshot.order(op).requested is not None for op in ops)


# -- one decision -----------------------------------------------------------------------------------------------------


def _candidates(
    op: "Op[...]", arguments: Mapping[str, Any], snapshot: Snapshot
) -> Iterator[tuple["Kernel", str | None]]:
    """Yield the kernels that a call may go to, in order, each with the reason why not (None: it takes the call)."""
    device = device_of(arguments).type
    kernels, requested = snapshot.order(op)
    for kernel in kernels:
        reason = kernel.backend.why_unusable(device, by_name=requested is not None)
        yield kernel, reason or kernel.why_not(arguments)


def _why_not_now(op: "Op[...]", kernel: "Kernel", arguments: Mapping[str, Any]) -> str | None:
    """Return why a kernel that takes calls like this one does not take these very arguments, or None."""
    disputed = layouts.disputed(op, device_of(arguments).type)
    return kernel.why_not_now(arguments) or layouts.why_not(kernel, disputed, arguments)


def choose(op: "Op[...]", arguments: Mapping[str, Any], cache: "DecisionCache") -> Callable[..., None]:
    """Return the function that runs calls like this one, or raise with every backend's reason."""
    dispatcher.load_entry_points()
    snapshot, device = cache.snapshot, device_of(arguments).type
    disputed = layouts.disputed(op, device)
    reasons: dict[str, str] = {}
    takers: list[Kernel] = []
    for kernel, reason in _candidates(op, arguments, snapshot):
        if reason is None:
            takers.append(kernel)
            if kernel.unsupported_layout is None and not disputed:
                break
        else:
            reasons[kernel.backend.name] = reason
    if not takers:
        raise _refused(op, reasons, snapshot)
    for name, reason in reasons.items():
        devices = dispatcher.backends[name].devices
        if devices is None or device in devices or snapshot.order(op).requested is not None:
            _warn_once(op, name, reason, takers[0])
    if takers[0].unsupported_layout is None and not disputed:
        function = _recorded(op, takers[0])
    else:
        function = _with_layout_checks(op, takers, reasons, disputed, snapshot)
    return _under(snapshot, function) if cache.is_foreign else function


def _under(snapshot: Snapshot, function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that runs as where the snapshot is selected: kernels read settings."""

    def run(*args: Any, **kwargs: Any) -> None:
        with dispatcher.override(snapshot):
            function(*args, **kwargs)

    return run


def require(op: "Op[...]", arguments: Mapping[str, Any]) -> None:
    """Raise with every backend's reason unless one takes these very arguments."""
    reasons: dict[str, str] = {}
    snapshot = dispatcher.current()
    for kernel, refusal in _candidates(op, arguments, snapshot):
        if (reason := refusal or _why_not_now(op, kernel, arguments)) is None:
            return
        reasons[kernel.backend.name] = reason
    raise _refused(op, reasons, snapshot)


def _with_layout_checks(
    op: "Op[...]",
    takers: list["Kernel"],
    reasons: Mapping[str, str],
    disputed: frozenset[str],
    snapshot: Snapshot,
) -> Callable[..., None]:
    """Return a function that asks before each run: refusals of strides, and in which layout disputed caches are."""
    runs = [(kernel, _recorded(op, kernel)) for kernel in takers]
    positional = [p.name for p in op.parameters if p.kind is not p.KEYWORD_ONLY]

    def run(*args: Any, **kwargs: Any) -> None:
        found = dict(reasons)
        arguments = dict(zip(positional, args, strict=True)) | kwargs if disputed else {}
        for kernel, function in runs:
            reason = kernel.unsupported_layout(*args, **kwargs) if kernel.unsupported_layout else None
            if reason is None and disputed:
                reason = layouts.why_not(kernel, disputed, arguments)
            if reason is None:
                for name in found.keys() - reasons.keys():
                    _warn_once(op, name, found[name], kernel)
                if disputed:
                    layouts.remember(kernel, disputed, arguments)
                return function(*args, **kwargs)
            found[kernel.backend.name] = reason
        raise _refused(op, found, snapshot)

    unsupported_layout, (_, function) = takers[0].unsupported_layout, runs[0]

    def run_first(*args: Any, **kwargs: Any) -> None:
        if unsupported_layout is None or unsupported_layout(*args, **kwargs) is None:  # nothing to warn of
            return function(*args, **kwargs)
        return run(*args, **kwargs)

    return run if disputed else run_first


def _recorded(op: "Op[...]", kernel: "Kernel") -> Callable[..., None]:
    """Return the kernel's function, or one that records its runs while a `record_selections` listens."""
    if not dispatcher.recorders:
        return kernel.function

    def run(*args: Any, **kwargs: Any) -> None:
        for recorder in dispatcher.recorders:
            recorder.append(Selection(op.qualname, kernel.backend.name))
        kernel.function(*args, **kwargs)

    return run


def _refused(op: "Op[...]", reasons: Mapping[str, str], snapshot: Snapshot) -> errors.NoBackendError:
    """Return the error that lists each backend's reason."""
    names, by = snapshot.order(op).requested or ((), "")
    says = "the backend asked for refuses this call" if len(names) == 1 else "no backend accepts this call"
    width = max(map(len, reasons), default=0)
    lines = [f"{op.qualname}: {says}", *(f"  {name:<{width}}  {reason}" for name, reason in reasons.items())]
    if len(names) == 1:
        lines.append(f"(asked for by {by}; a backend asked for by name never falls back)")
    elif names:
        lines.append(f"(asked for by {by}: {', '.join(names)}, and no others)")
    return errors.NoBackendError("\n".join(lines), reasons)


def _warn_once(op: "Op[...]", name: str, reason: str, taker: "Kernel") -> None:
    """Warn, once per op and backend, that the default order went past a backend made for this device."""
    if (op.qualname, name) not in _warned:
        _warned.add((op.qualname, name))
        warnings.warn(
            f"{op.qualname} runs on {taker.backend.name} because {name} does not take the call: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )


def note_capture(op: "Op[...]", arguments: Mapping[str, Any], *, has_token: bool) -> None:
    """Remember on what a call runs that is being captured."""
    refused: dict[str, str] = {}
    snapshot = dispatcher.current()
    for kernel, refusal in _candidates(op, arguments, snapshot):
        if (reason := refusal or _why_not_now(op, kernel, arguments)) is None:
            device, own = device_of(arguments), capture.settings_of(op, snapshot)
            capture.note(op, kernel.backend.name, refused, own, device, has_token=has_token)
            return
        refused[kernel.backend.name] = reason


# -- what users ask --------------------------------------------------------------------------------------------------


@contextmanager
def record_selections() -> Iterator[list[Selection]]:
    """Within the block, append one `Selection(op, backend)` for every run of an op in the process, in compiled graphs
    too.

    A replayed CUDA graph runs no Python, so its ops are seen when it is recorded and not when it is replayed.
    """
    record: list[Selection] = []
    dispatcher.record(record)
    try:
        yield record
    finally:
        dispatcher.record(record, stop=True)


def explain(op: "Op[...] | str", /, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would run on and why not the others, without running it.

    Args:
        op: the op or its name.
        args, kwargs: the call's arguments, as for the op itself.

    Raises:
        ValueError: as the call itself would, for bad arguments.
    """
    dispatcher.load_entry_points()
    if isinstance(op, str):
        names = {o.name: o for o in reversed(dispatcher.ops.values())} | dispatcher.ops
        if op not in names:
            raise errors.unknown("op", op, [o.name for o in dispatcher.ops.values()])
        op = names[op]
    arguments = op.fill(op.bind(args, kwargs))
    op.check(arguments)
    snapshot = dispatcher.current()
    requested = snapshot.order(op).requested
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments, snapshot):
        reason = refusal or _why_not_now(op, kernel, arguments)
        if reason is None and chosen is None:
            chosen = kernel.backend.name
        else:
            order = f"the order of {requested[1]}" if requested else "the default order"
            reasons[kernel.backend.name] = reason or f"comes after {chosen} in {order}"
    if requested:
        names_asked = ", ".join(requested[0])
        reasons |= {n: f"{requested[1]} asks for {names_asked}" for n in op.kernels if n not in requested[0]}
    return Explanation(op.qualname, chosen, requested[1] if requested and chosen else None, reasons)
