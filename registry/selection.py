"""Which kernel runs: the default order, the environment, `use_backend`, and what depends on them.

All state here is process-wide and changes under one lock. A change forgets every remembered decision, raises the
generation, and gives compiled graphs a new selection token.
"""

import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import errors, tokens
from mamba_ops.registry.memory import Memory
from mamba_ops.registry.tables import backends, load_entry_points, lock, namespaces, ops

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Kernel
    from mamba_ops.registry.op import Op


@dataclass(frozen=True)
class _Binding:
    """One request for backends by name."""

    by: str
    everywhere: str | None = None  # binds the ops for which this backend has a kernel, and what is composed of them
    ops: Mapping[str, str] = field(default_factory=dict)

    def of(self, op: "Op[...]") -> str | None:
        name = self.ops.get(op.name)
        if name is not None or self.everywhere is None:
            return name
        if self.everywhere in op.kernels:
            return self.everywhere
        return COMPOSED if op.composed else None  # then it is the ops inside that the name binds


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


COMPOSED = "composed"
"""Name of the backend whose kernels call other ops."""

_environments: dict[str, _Binding] = {}  # namespace to what its environment variable asks for, once read
_bindings: list[_Binding] = []  # use_backend() now active, outermost first
_recorders: list[list[Selection]] = []
_warned: set[tuple[str, str]] = set()
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
        _environments.pop(name, None)
        for op in [op for op in ops.values() if op.qualname.startswith(f"{name}::")]:
            del ops[op.qualname]
        changed()


def changed() -> None:
    """Forget all decisions, raise the generation and renew the tokens."""
    global _generation
    with lock:
        _generation += 1
        _forget()
        tokens.renew(_fingerprint)


def _fingerprint() -> Hashable:
    """Return what two selections have in common if and only if every op has the same kernels in the same order.

    The environment is the same all the time, so it is left out (and not read before the first selection).
    """
    asked = frozenset((op.qualname, a[0]) for op in ops.values() if (a := _asked(op)) is not None)
    return asked, frozenset((op.qualname, name) for op in ops.values() for name in op.kernels)


# -- one decision -----------------------------------------------------------------------------------------------------


def _asked(op: "Op[...]") -> tuple[str, str] | None:
    """Return the backend that use_backend() asks for, for this op, and who asked."""
    for binding in reversed(_bindings):
        if (name := binding.of(op)) is not None:
            return name, binding.by
    return None


def _bound(op: "Op[...]") -> tuple[str, str] | None:
    """Return the backend that was asked for by name for this op, and who asked."""
    if (asked := _asked(op)) is None:
        binding = _environment(op.qualname.split("::")[0])
        asked = None if (name := binding.of(op)) is None else (name, binding.by)
    return asked


def _environment(namespace: str) -> _Binding:
    """Read `<NAMESPACE>_BACKEND`: `triton`, or `op=backend` entries and at most one bare name, separated by commas."""
    with lock:
        binding = _environments.get(namespace)
        if binding is None:
            variable = f"{namespace.upper()}_BACKEND"
            entries = [e.strip() for e in os.environ.get(variable, "").split(",") if e.strip()]
            bare = [e for e in entries if "=" not in e]
            if len(bare) > 1:
                raise errors.RegistryError(f"{variable}: got the bare names {', '.join(bare)}, expected at most one")
            named = dict(e.split("=", 1) for e in entries if "=" in e)
            try:
                binding = _binding(variable, bare[0] if bare else None, named)
            except errors.RegistryError as error:
                raise type(error)(f"{variable}: {error}") from None
            _environments[namespace] = binding
        return binding


def _binding(by: str, everywhere: str | None, named: Mapping[str, str]) -> _Binding:
    """Check names, in any case, against what is known."""
    load_entry_points()
    shorts = {op.name.lower(): op.name for op in ops.values()}
    bound: dict[str, str] = {}
    for name, backend in ((n.strip(), b.strip().lower()) for n, b in named.items()):
        if name.lower() not in shorts:
            raise errors.unknown("op", name, shorts.values())
        if backend not in backends:
            raise errors.unknown("backend", backend, backends)
        bound[shorts[name.lower()]] = backend
        for op in (op for op in ops.values() if op.name == shorts[name.lower()]):
            if backend not in op.kernels:
                raise errors.no_kernel(backend, op.qualname, op.kernels)
    if everywhere is not None and (everywhere := everywhere.strip().lower()) not in backends:
        raise errors.unknown("backend", everywhere, backends)
    return _Binding(by, everywhere, bound)


def _candidates(op: "Op[...]", arguments: Mapping[str, Any]) -> Iterator[tuple["Kernel", str | None]]:
    """Yield the kernels that a call may go to, in order, each with the reason why not (None: it takes the call)."""
    named = _bound(op)
    device = next(a.device.type for a in arguments.values() if isinstance(a, Tensor))
    order = sorted(op.kernels.values(), key=lambda k: (-k.backend.priority, k.backend.name))
    for kernel in [op.kernels[named[0]]] if named else order:
        yield kernel, kernel.backend.why_unusable(device, by_name=bool(named)) or kernel.why_not(arguments)


def choose(op: "Op[...]", arguments: Mapping[str, Any]) -> Callable[..., None]:
    """Return the function that runs calls like this one, or raise with every backend's reason."""
    load_entry_points()
    reasons: dict[str, str] = {}
    takers: list[Kernel] = []
    for kernel, reason in _candidates(op, arguments):
        if reason is None:
            takers.append(kernel)
            if kernel.per_call is None:
                break
        else:
            reasons[kernel.backend.name] = reason
    if not takers:
        raise _refused(op, reasons)
    device = next(a.device.type for a in arguments.values() if isinstance(a, Tensor))
    for name, reason in reasons.items():
        devices = backends[name].devices
        if devices is None or device in devices:
            _say_once(op, name, reason, takers[0])
    if takers[0].per_call is None:
        return _recorded(op, takers[0])
    return _asking(op, takers, reasons)


def is_bound(op: "Op[...]") -> bool:
    """Return whether somebody asked for one backend by name, for this op."""
    return _bound(op) is not None


def require(op: "Op[...]", arguments: Mapping[str, Any]) -> None:
    """Raise with every backend's reason unless one takes these very arguments."""
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments):
        if (reason := refusal or kernel.why_not_now(arguments)) is None:
            return
        reasons[kernel.backend.name] = reason
    raise _refused(op, reasons)


def _asking(op: "Op[...]", takers: list["Kernel"], reasons: Mapping[str, str]) -> Callable[..., None]:
    """Return a function that asks per-call refusals before each run."""
    runs = [(kernel, _recorded(op, kernel)) for kernel in takers]

    def run(*args: Any, **kwargs: Any) -> None:
        said = dict(reasons)
        for kernel, function in runs:
            reason = kernel.per_call(*args, **kwargs) if kernel.per_call else None
            if reason is None:
                for name in said.keys() - reasons.keys():
                    _say_once(op, name, said[name], kernel)
                return function(*args, **kwargs)
            said[kernel.backend.name] = reason
        raise _refused(op, said)

    return run


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
    named = _bound(op)
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


# -- what users call --------------------------------------------------------------------------------------------------


def use_backend(backend: str | None = None, /, **named: str) -> AbstractContextManager[None]:
    """Within the block, run ops on the backends named, in the whole process; nothing is recompiled.

    A backend asked for by name never falls back: what it does not take raises, with the reason.

    Args:
        backend: binds every op for which this backend has a kernel; other ops keep the default order. An op that is
            composed of others runs on them, on this backend where they have it.
        named: `op_name="backend"` for single ops. Names are taken in any case.

    Raises:
        UnknownNameError: a name that nobody registered; the message lists the valid ones.
        RegistryError: the backend has no kernel for an op named, or the call stands inside a traced region.
    """
    if torch.compiler.is_dynamo_compiling():  # true in traced code alone, whatever other threads do
        _refuse_while_tracing()
    return _active(_binding("use_backend", backend, named))


def _refuse_while_tracing() -> None:
    raise errors.swap_while_tracing()


# Marked as constant, it runs while Dynamo traces and its error is the user's; an error raised in traced code would only
# break the graph.
_refuse_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def _active(binding: _Binding) -> Iterator[None]:
    with lock:
        _bindings.append(binding)
        changed()
    try:
        yield
    finally:
        with lock:
            _bindings[:] = [b for b in _bindings if b is not binding]  # threads may leave in another order
            changed()


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
    arguments = op.bind(args, kwargs)
    op.check(arguments)
    named = _bound(op)
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for kernel, refusal in _candidates(op, arguments):
        reason = refusal or kernel.why_not_now(arguments)
        if reason is None and chosen is None:
            chosen = kernel.backend.name
        else:
            reasons[kernel.backend.name] = reason or f"comes after {chosen} in the default order"
    if named:
        reasons |= {n: f"{named[1]} asks for {named[0]}" for n in op.kernels if n != named[0]}
    return Explanation(op.qualname, chosen, named[1] if named and chosen else None, reasons)
