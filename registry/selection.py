"""Which kernel runs a call, and why not the others."""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from mamba_ops.registry import _torch, errors, layouts
from mamba_ops.registry.decomposition import is_decomposing
from mamba_ops.registry.dispatcher import device_of, dispatcher
from mamba_ops.registry.snapshot import COMPOSED, Snapshot

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.op import Op
    from mamba_ops.registry.snapshot import DecisionCache


class Selection(NamedTuple):
    """One run of an op, as `record_selections` saw it."""

    op: str
    backend: str


@dataclass(frozen=True)
class Explanation:
    """Which backend a call would run on, and why not on the others."""

    op: str  # its qualified name
    backend: str | None  # that would run; None: no backend takes the call
    bound_by: str | None  # what asked for it by name (use_backend, an environment variable); None: the default order
    reasons: Mapping[str, str]  # backend to the sentence why it would not run
    why: str | None = None  # why it was asked for, where that is known: it was timed, say

    def __str__(self) -> str:
        why = f"; {self.why}" if self.why else ""
        rows = [(self.backend, f"runs ({self.bound_by or 'default order'}{why})")] if self.backend else []
        return "\n".join([self.op, *_table([*rows, *self.reasons.items()])])


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
    has_explicit_backend(*dispatcher.ops.values())


def has_explicit_backend(*ops: "Op[...]") -> bool:
    """Return whether backends are asked for by name for any of these ops: only then may `check_supported` raise."""
    snapshot = dispatcher.current()
    return not is_decomposing() and any(snapshot.order(op).requested is not None for op in ops)


def pays(op: "Op[...]", *tensors: Tensor | None) -> bool:
    """Return whether a call of an op is to take the place of the torch functions that do the same.

    It is where a kernel runs at once on tensors like these, given the first one's device: not while anything is traced,
    transformed or recorded for gradients, as compilers and autograd know the functions, and not for tensors that stand
    for others. Without a kernel for the device, as on a CPU, the functions stay, too.
    """
    if not runs_at_once(*tensors) or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    ):
        return False
    first = tensors[0]
    return first is not None and dispatcher.current().has_kernel(op, first.device.type)


def runs_at_once(*tensors: Tensor | None) -> bool:
    """Return whether nothing traces or transforms what is called here, and tensors stand for nothing but themselves."""
    if torch.compiler.is_compiling() or _torch.is_transformed():
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return False
    return all(t is None or type(t) is Tensor or type(t) is Parameter for t in tensors)


def _candidates(
    op: "Op[...]", arguments: Mapping[str, Any], snapshot: Snapshot, *, rehearses: bool = True
) -> Iterator[tuple["Kernel", str | None]]:
    """Yield the kernels that a call may go to, in order, each with the reason why not that holds for all calls like
    this one (None: it takes such calls).
    """
    device = device_of(arguments).type
    kernels, requested = snapshot.order(op)
    for kernel in kernels:
        reason = kernel.backend.why_unusable(device, by_name=requested is not None) or kernel.why_not(arguments)
        yield kernel, reason or kernel.why_not_here(arguments, rehearses=rehearses)


def _why_not_now(kernel: "Kernel", arguments: Mapping[str, Any]) -> str | None:
    return kernel.why_not_now(arguments) or layouts.why_not(kernel, arguments)


def first_taker(
    op: "Op[...]", arguments: Mapping[str, Any], snapshot: Snapshot
) -> tuple["Kernel | None", dict[str, str]]:
    """Return the kernel that would run these very arguments, or None, and why those before it do not."""
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments, snapshot):
        if (reason := refusal or _why_not_now(kernel, arguments)) is None:
            return kernel, reasons
        reasons[kernel.backend.name] = reason
    return None, reasons


def choose(op: "Op[...]", arguments: Mapping[str, Any], cache: "DecisionCache") -> Callable[..., None]:
    """Return the function that runs calls like this one, or raise with every backend's reason."""
    dispatcher.load_entry_points()
    snapshot, device = cache.snapshot, device_of(arguments).type
    disputed = layouts.disputed(op, device)
    reasons: dict[str, str] = {}
    takers: list[Kernel] = []
    for kernel, reason in _candidates(op, arguments, snapshot):
        if reason is not None:
            reasons[kernel.backend.name] = reason
            continue
        takers.append(kernel)
        if kernel.unsupported_layout is None and not disputed:
            break
    if not takers:
        raise refused(op, reasons, snapshot)
    for name, reason in reasons.items():
        if op.kernels[name].partial and takers[0].backend.name == COMPOSED:
            continue
        if snapshot.order(op).requested is not None or dispatcher.backends[name].is_for(device):
            _warn_once(op, name, reason, takers[0])
    function = _recorded(takers[0])
    if disputed or takers[0].unsupported_layout is not None:
        function = _with_layout_checks(takers, reasons, bool(disputed), snapshot)
    return _under(snapshot, function) if cache.is_foreign else function


def _under(snapshot: Snapshot, function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that runs as where the snapshot is selected: kernels read settings."""

    def run(*args: Any, **kwargs: Any) -> None:
        with dispatcher.override(snapshot):
            function(*args, **kwargs)

    return run


def _with_layout_checks(
    takers: list["Kernel"], reasons: Mapping[str, str], is_disputed: bool, snapshot: Snapshot
) -> Callable[..., None]:
    """Return a function that asks before each run: refusals of strides, and in which layout disputed caches are."""
    op, refuses, first = takers[0].op, takers[0].unsupported_layout, _recorded(takers[0])
    runs = [(kernel, _recorded(kernel)) for kernel in takers]

    def run(*args: Any, **kwargs: Any) -> None:
        if not is_disputed and (refuses is None or refuses(*args, **kwargs) is None):  # the usual case
            return first(*args, **kwargs)
        arguments = {p.name: value for p, value in zip(op.parameters, args, strict=False)} | kwargs
        found = dict(reasons)
        for kernel, function in runs:
            if (reason := _why_not_now(kernel, arguments)) is None:
                for name in found.keys() - reasons.keys():
                    _warn_once(op, name, found[name], kernel)
                layouts.remember(kernel, arguments)
                return function(*args, **kwargs)
            found[kernel.backend.name] = reason
        raise refused(op, found, snapshot)

    return run


def _recorded(kernel: "Kernel") -> Callable[..., None]:
    """Return the kernel's function, or one that records its runs while a `record_selections` listens."""
    if not dispatcher.recorders:
        return kernel.function

    def run(*args: Any, **kwargs: Any) -> None:
        for recorder in dispatcher.recorders:
            recorder.append(Selection(kernel.op.qualname, kernel.backend.name))
        kernel.function(*args, **kwargs)

    return run


def refused(op: "Op[...]", reasons: Mapping[str, str], snapshot: Snapshot) -> errors.NoBackendError:
    """Return the error that lists each backend's reason."""
    names, by = snapshot.order(op).requested or ((), "")
    says = "the backend asked for refuses this call" if len(names) == 1 else "no backend accepts this call"
    lines = [f"{op.qualname}: {says}", *_table(reasons.items())]
    if len(names) == 1:
        lines.append(f"(asked for by {by}; a backend asked for by name never falls back)")
    elif names:
        lines.append(f"(asked for by {by}: {', '.join(names)}, and no others)")
    return errors.NoBackendError("\n".join(lines), reasons)


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {reason}" for name, reason in rows]


def _warn_once(op: "Op[...]", name: str, reason: str, taker: "Kernel") -> None:
    """Warn, once per op and backend, that the default order went past a backend made for this device."""
    if (op.qualname, name) not in _warned:
        _warned.add((op.qualname, name))
        sentence = f"{op.qualname} runs on {taker.backend.name} because {name} does not take the call: {reason}"
        warnings.warn(sentence, RuntimeWarning, stacklevel=2)


@contextmanager
def record_selections() -> Iterator[list[Selection]]:
    """Within the block, append a `Selection(op, backend)` for every run of an op in the process, compiled or not.

    A replayed CUDA graph runs no Python, so its ops are seen when it is recorded and not when it is replayed.
    """
    record: list[Selection] = []
    with dispatcher.lock:
        dispatcher.recorders = (*dispatcher.recorders, record)
        dispatcher.reselect()
    try:
        yield record
    finally:
        with dispatcher.lock:
            dispatcher.recorders = tuple(r for r in dispatcher.recorders if r is not record)
            dispatcher.reselect()


def explain(op: "Op[...] | str", /, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would run on and why not the others, without running it.

    Nothing is compiled: that a device cannot run a kernel is known from the first call like this one on.

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
    if not hasattr(op, "check_supported"):
        raise errors.RegistryError(f"explain: op: got a {type(op).__name__}, expected an op or its name")
    try:
        arguments = op.fill(op.bind(args, kwargs))
        op.check(arguments)
    except ValueError:
        raise
    except Exception as error:  # of what none of these were made for
        raise op.explained(error, args, kwargs) from error
    snapshot = dispatcher.current()
    asked, by = snapshot.order(op).requested or ((), None)
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments, snapshot, rehearses=False):
        reason = refusal or _why_not_now(kernel, arguments)
        if reason is None and chosen is None:
            chosen = kernel.backend.name
        else:
            order = f"the order of {by}" if by else "the default order"
            reasons[kernel.backend.name] = reason or f"comes after {chosen} in {order}"
    if by is not None:
        reasons |= {name: f"{by} asks for {', '.join(asked)}" for name in op.kernels if name not in asked}
    asking = next((r for r in snapshot.requests if r.of(op) is not None), None) if by is not None else None
    why = dict(asking.why).get(op.name) if asking is not None and chosen is not None else None
    return Explanation(op.qualname, chosen, by if chosen else None, reasons, why)
