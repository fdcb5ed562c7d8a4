"""Which kernel runs: the default order, the environment, `configure`, `use_backend`, and what depends on them.

All state here is process-wide and changes under one lock. A change forgets every remembered decision, raises the
generation, and gives compiled graphs a new selection token.
"""

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import capture, errors, layouts, request, tokens
from mamba_ops.registry.memory import Memory
from mamba_ops.registry.request import Request
from mamba_ops.registry.tables import backends, load_entry_points, lock, namespaces, ops

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
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
        bound_by: who asked for it by name ("use_backend", an environment variable), or None for the default order.
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


_recorders: list[list[Selection]] = []
_warned: set[tuple[str, str]] = set()
_requests: dict[Hashable, tuple[Request, ...]] = {}  # what was asked for under the selections that tokens name
_settled = False  # whether backends have the settings in force
_asked: bool | None = None  # whether backends are asked for by name, in any thread; None: not looked at since a change
_generation = 0  # raised whenever another kernel may be chosen than before


# -- changes ----------------------------------------------------------------------------------------------------------


def generation() -> int:
    """Return the generation of the selection: it changes whenever another kernel may be chosen than before."""
    return _generation


def _forget() -> None:
    with lock:
        for op in ops.values():
            op._memories[0] = Memory()


def remove_namespace(name: str) -> None:
    """Forget a namespace, its ops and what its environment variable asked for."""
    with lock:
        namespaces.pop(name, None)
        request.forget_environment(name)
        for op in [op for op in ops.values() if op.qualname.startswith(f"{name}::")]:
            del ops[op.qualname]
            capture.forget(op)
        changed()


def changed() -> None:
    """Forget all decisions, raise the generation and renew the tokens."""
    global _generation, _settled, _asked
    with lock:
        _generation += 1
        _settled, _asked = False, None
        _forget()
        tokens.renew(_fingerprint)


def _settle() -> None:
    """Hand backends the settings in force, before anything is decided; not at every change, for the environment is not
    read before the first selection.
    """
    global _settled
    if _settled:
        return
    with lock:
        for backend in backends.values():
            backend.take_settings(request.settings())
        _settled = True


def _fingerprint() -> Hashable:
    """Return what two selections have in common if and only if every op has the same kernels in the same order.

    The environment is the same all the time, so it is left out (and not read before the first selection).
    """
    asked = frozenset((op.qualname, a[0]) for op in ops.values() if (a := request.asked(op)) is not None)
    kernels = frozenset((op.qualname, k, k.backend.priority) for op in ops.values() for k in op.kernels.values())
    stated = request.stated()
    selection = asked, kernels, None if stated is None else frozenset(stated.items()), layouts.renewals()
    _requests[selection] = request.in_force()
    return selection


def named_by(token: Tensor | None) -> AbstractContextManager[None]:
    """Within the block, this thread chooses as under the selection that a token names; None: the one in force."""
    return request.as_if(None if token is None else _requests[tokens.selection_of(token)])


# -- one decision -----------------------------------------------------------------------------------------------------


def _order(op: "Op[...]") -> tuple[list["Kernel"], bool]:
    """Return the kernels that a call may go to, in order, and whether they were asked for by name.

    It is remembered until something changes, but not in a thread that chooses under another selection than that in
    force.
    """
    memory = op._memories[0]
    if memory.order is not None and not request.is_as_if():
        return memory.order
    if (named := request.bound(op)) is not None:
        order = [op.kernels[name] for name in named[0]], True
    else:
        order = sorted(op.kernels.values(), key=lambda k: (-k.backend.priority, k.backend.name)), False
    if not request.is_as_if():
        memory.order = order
    return order


def look_ahead() -> None:
    """Look at what every decision asks first, so that the next call need not."""
    load_entry_points()
    _settle()
    may_refuse()
    for op in ops.values():
        _order(op)


def _candidates(op: "Op[...]", arguments: Mapping[str, Any]) -> Iterator[tuple["Kernel", str | None]]:
    """Yield the kernels that a call may go to, in order, each with the reason why not (None: it takes the call)."""
    device = device_of(arguments).type
    kernels, by_name = _order(op)
    for kernel in kernels:
        yield kernel, kernel.backend.why_unusable(device, by_name=by_name) or kernel.why_not(arguments)


def device_of(arguments: Mapping[str, Any]) -> torch.device:
    """Return the device that a call runs on."""
    for argument in arguments.values():
        if isinstance(argument, Tensor):
            return argument.device
    raise AssertionError("every op has a tensor")


def _why_not_now(op: "Op[...]", kernel: "Kernel", arguments: Mapping[str, Any]) -> str | None:
    """Return why a kernel that takes calls like this one does not take these very arguments, or None."""
    disputed = layouts.disputed(op, device_of(arguments).type)
    return kernel.why_not_now(arguments) or layouts.why_not(kernel, disputed, arguments)


def choose(op: "Op[...]", arguments: Mapping[str, Any]) -> Callable[..., None]:
    """Return the function that runs calls like this one, or raise with every backend's reason."""
    load_entry_points()
    _settle()
    device = device_of(arguments).type
    disputed = layouts.disputed(op, device)
    reasons: dict[str, str] = {}
    takers: list[Kernel] = []
    for kernel, reason in _candidates(op, arguments):
        if reason is None:
            takers.append(kernel)
            if kernel.unsupported_layout is None and not disputed:
                break
        else:
            reasons[kernel.backend.name] = reason
    if not takers:
        raise _refused(op, reasons)
    for name, reason in reasons.items():
        devices = backends[name].devices
        if devices is None or device in devices or is_bound(op):
            _say_once(op, name, reason, takers[0])
    if takers[0].unsupported_layout is None and not disputed:
        return _recorded(op, takers[0])
    return _asking(op, takers, reasons, disputed)


def is_bound(op: "Op[...]") -> bool:
    """Return whether somebody asked for backends by name, for this op."""
    return request.bound(op) is not None


def may_refuse(*some: "Op[...]") -> bool:
    """Return whether backends are asked for by name for any of these ops: only then may `Op.check_supported` raise."""
    global _asked
    asked = True if request.is_as_if() else _asked
    if asked is None:
        with lock:
            asked = _asked = request.anybody_asks()
    return asked and any(map(is_bound, some))


def require(op: "Op[...]", arguments: Mapping[str, Any]) -> None:
    """Raise with every backend's reason unless one takes these very arguments."""
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments):
        if (reason := refusal or _why_not_now(op, kernel, arguments)) is None:
            return
        reasons[kernel.backend.name] = reason
    raise _refused(op, reasons)


def _asking(
    op: "Op[...]", takers: list["Kernel"], reasons: Mapping[str, str], disputed: frozenset[str]
) -> Callable[..., None]:
    """Return a function that asks before each run: per-call refusals, and in which layout disputed caches are."""
    runs = [(kernel, _recorded(op, kernel)) for kernel in takers]
    positional = [p.name for p in op.parameters if p.kind is not p.KEYWORD_ONLY]

    def run(*args: Any, **kwargs: Any) -> None:
        said = dict(reasons)
        arguments = dict(zip(positional, args, strict=True)) | kwargs if disputed else {}
        for kernel, function in runs:
            reason = kernel.unsupported_layout(*args, **kwargs) if kernel.unsupported_layout else None
            if reason is None and disputed:
                reason = layouts.why_not(kernel, disputed, arguments)
            if reason is None:
                for name in said.keys() - reasons.keys():
                    _say_once(op, name, said[name], kernel)
                if disputed:
                    layouts.remember(kernel, disputed, arguments)
                return function(*args, **kwargs)
            said[kernel.backend.name] = reason
        raise _refused(op, said)

    per_call, (_, function) = takers[0].unsupported_layout, runs[0]

    def run_first(*args: Any, **kwargs: Any) -> None:
        if per_call is None or per_call(*args, **kwargs) is None:  # nothing to be said of anybody
            return function(*args, **kwargs)
        return run(*args, **kwargs)

    return run if disputed else run_first


def _recorded(op: "Op[...]", kernel: "Kernel") -> Callable[..., None]:
    """Return the kernel's function, or one that records its runs if somebody listens."""
    if not _recorders:
        return kernel.function

    def run(*args: Any, **kwargs: Any) -> None:
        for recorder in list(_recorders):
            recorder.append(Selection(op.qualname, kernel.backend.name))
        kernel.function(*args, **kwargs)

    return run


def _refused(op: "Op[...]", reasons: Mapping[str, str]) -> errors.NoBackendError:
    named = request.bound(op)
    if named is not None and len(named[0]) > 1:
        return errors.no_taker(op.qualname, reasons, asked=named[0], bound_by=named[1])
    return errors.no_backend(op.qualname, reasons, bound_by=named[1] if named else None)


def _say_once(op: "Op[...]", name: str, reason: str, taker: "Kernel") -> None:
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
    for kernel, refusal in _candidates(op, arguments):
        if (reason := refusal or _why_not_now(op, kernel, arguments)) is None:
            device = device_of(arguments)
            capture.note(op, kernel.backend.name, refused, _settings_of(op), device, has_token=has_token)
            return
        refused[kernel.backend.name] = reason


def warn_of_captures() -> None:
    """Say which graphs that callers captured no longer run what is selected; after every swap."""
    capture.warn(lambda op: [kernel.backend.name for kernel in _order(op)[0]], _settings_of)


def _settings_of(op: "Op[...]") -> frozenset[tuple[str, Hashable]]:
    """Return the settings in force, without those at their defaults, that an op's kernels may read."""
    own = {
        f"{k.backend.name}_{name}": values[0] for k in op.kernels.values() for name, values in k.backend.choices.items()
    }
    now = request.settings().items()
    return frozenset((n, v) for n, v in now if v and own.get(n) != v and (n in own or op.has_default_arguments))


# -- what users ask --------------------------------------------------------------------------------------------------


@contextmanager
def record_selections() -> Iterator[list[Selection]]:
    """Within the block, append one `Selection(op, backend)` for every run of an op, inside compiled graphs too.

    A replayed CUDA graph runs no Python, so its ops are seen when it is recorded and not when it is replayed.
    """
    record: list[Selection] = []
    with lock:
        _recorders.append(record)
        _forget()
    try:
        yield record
    finally:
        with lock:
            _recorders[:] = [r for r in _recorders if r is not record]
            _forget()


def explain(op: "Op[...] | str", /, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend a call would run on and why not the others, without running it.

    Args:
        op: the op or its name.
        args, kwargs: the call's arguments, as for the op itself.

    Raises:
        ValueError: as the call itself would, for bad arguments.
    """
    load_entry_points()
    if isinstance(op, str):
        names = {o.name: o for o in reversed(ops.values())} | ops
        if op not in names:
            raise errors.unknown("op", op, [o.name for o in ops.values()])
        op = names[op]
    arguments = op.fill(op.bind(args, kwargs))
    op.check(arguments)
    named = request.bound(op)
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments):
        reason = refusal or _why_not_now(op, kernel, arguments)
        if reason is None and chosen is None:
            chosen = kernel.backend.name
        else:
            whose = f"the order of {named[1]}" if named else "the default order"
            reasons[kernel.backend.name] = reason or f"comes after {chosen} in {whose}"
    if named:
        reasons |= {n: f"{named[1]} asks for {', '.join(named[0])}" for n in op.kernels if n not in named[0]}
    return Explanation(op.qualname, chosen, named[1] if named and chosen else None, reasons)
