"""Requests: which backends run which ops, asked for by `use_backend`, `configure` or the environment.

A request that comes into force is a swap: another kernel runs from then on, and nothing is recompiled.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ContextDecorator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mamba_ops.registry import _torch, capture, errors, token
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.snapshot import Names, Request, Requests

if TYPE_CHECKING:
    from mamba_ops.registry.namespace import Namespace

    class Requester(Protocol):
        """What `use_backend` and `configure` take beside names, such as a `mamba_ops.BackendConfig`."""

        def request(self, by: str) -> Request:
            """Return what is asked for, said to be asked for by `by`."""


class _Swap(ContextDecorator):
    """What `use_backend` returns: a block, or a decorator."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._entered: list[tuple[Requests, Requests]] = []  # what was active before, and what then

    def __enter__(self) -> None:
        capture.refuse_swap("use_backend()")
        outer = dispatcher.active.get()
        inner = outer.plus(self._request)
        self._entered.append((outer, inner))
        self._activate(inner)

    def __exit__(self, *_: object) -> None:
        outer, inner = self._entered.pop()
        active = dispatcher.active.get()
        self._activate(outer if active is inner else active.minus(self._request))
        capture.refuse_swap("use_backend()")  # the block was left all the same; what is being captured is not usable

    def _activate(self, active: Requests) -> None:
        dispatcher.active.set(active)
        snapshot = dispatcher.snapshot(active)
        token.follow(snapshot)
        if dispatcher.captured:
            capture.warn_of_swap(snapshot, stacklevel=4)


def use_backend(backend: "str | Requester | None" = None, /, **named: str) -> _Swap:
    """Within the block, run ops on the backends named, in this thread or asyncio task; nothing is recompiled.

    A backend asked for by name never falls back: what it does not take raises, with the reason. An order of several,
    `"flashinfer:triton"`, goes on to the next, warns once, and never leaves the order. A thread that is started within
    the block does not inherit it (`contextvars.copy_context().run` does); `configure` is for the whole process.

    Args:
        backend: binds every op for which this backend has a kernel; other ops keep the default order. An op that is
            composed of others runs on them, on this backend where they have it. Or a `mamba_ops.BackendConfig`.
        named: `op_name="backend"` for single ops. Names are taken in any case.

    Raises:
        UnknownNameError: a name that is not registered; the message lists the valid ones.
        RegistryError: the backend has no kernel for an op named, the call stands inside a traced region, or this thread
            captures a graph (also when the block is left).
    """
    if torch.compiler.is_dynamo_compiling():  # true in traced code alone, whatever other threads do
        _refuse_while_tracing("use_backend")
    if backend is None or isinstance(backend, str):
        return _Swap(_request_in_words(backend or "", **named))
    requested, more = _request_of(backend, "use_backend"), _request_in_words("", **named)
    return _Swap(requested._replace(ops=tuple(dict(requested.ops + more.ops).items())))


def checking() -> _Swap:
    """Within the block, check the values of all calls, on any device: slots, lengths and other indices.

    A wrong one is then the ValueError that it is on a CPU; without, a row of it counts as padding there. Each call
    waits for the device, so this is for finding mistakes. `<NAMESPACE>_CHECK=1` in the environment says it for the
    whole process. It is as local as `use_backend`, and calls that a graph captures are not checked.

    Raises:
        RegistryError: inside a traced region, or while this thread captures a graph (also when the block is left).
    """
    if torch.compiler.is_dynamo_compiling():
        _refuse_while_tracing("checking")
    return _Swap(_CHECKING)


_CHECKING = Request("checking", checks_values=True)


def configure(config: "Requester | None") -> None:
    """Put a configuration in force for the process, in place of the one before; None takes it away.

    It stands behind `use_backend`, and before the environment and the default order; nothing is recompiled.

    Args:
        config: a `mamba_ops.BackendConfig`.

    Raises:
        RegistryError: inside a traced region, or while this thread captures a graph.
    """
    if torch.compiler.is_dynamo_compiling():
        _refuse_while_tracing("configure")
    requested = None if config is None else _request_of(config, type(config).__name__, "configure")
    capture.refuse_swap("configure()")
    with dispatcher.lock:
        dispatcher.configured = requested
        dispatcher.reselect()
    capture.warn_of_swap(dispatcher.current(), stacklevel=3)


@cache
def _request_in_words(backend: str, **named: str) -> Request:
    for op, names in named.items():
        if not isinstance(names, str):
            expected = "names of backends, as 'flashinfer:triton'"
            raise errors.RegistryError(f"use_backend: {op}: got {names!r}, expected {expected}")
    orders = {op: order_of(names) for op, names in named.items()}
    return make("use_backend", order_of(backend), orders)


dispatcher.listeners.append(_request_in_words.cache_clear)  # which names are known may have changed


def _request_of(config: "Requester", by: str, what: str = "use_backend") -> Request:
    if not hasattr(config, "request"):
        names = ", a backend's name" if what == "use_backend" else ""
        raise errors.RegistryError(f"{what}: got {config!r}, expected a BackendConfig{names} or None")
    return config.request(by)


@_torch.constant
def _refuse_while_tracing(what: str) -> None:
    # Marked as constant, it runs while Dynamo traces and its error is the user's; an error raised in traced code would
    # only break the graph.
    raise errors.RegistryError(
        f"{what}() was called inside a region that torch.compile traces; call it around the compiled function"
    )


def make(
    by: str,
    everywhere: Sequence[str] = (),
    named: Mapping[str, Sequence[str]] | None = None,
    settings: Mapping[str, Hashable] | None = None,
) -> Request:
    """Return the request for these names, in any case; raise the first of `problems`."""
    orders = {known_op(op) or op: lowered(names) for op, names in (named or {}).items()}
    request = Request(by, lowered(everywhere), tuple(orders.items()), tuple(settings.items()) if settings else None)
    for problem in problems(request):
        raise problem
    return request


def problems(request: Request) -> list[errors.RegistryError]:
    """Return an error for each name that is not registered and each order that makes no sense."""
    dispatcher.load_entry_points()
    ops, backends = dispatcher.ops.values(), dispatcher.backends
    found: list[errors.RegistryError] = []
    for place, names in (("", request.everywhere), *request.ops):
        where = [op for op in ops if op.name == place]
        if place and not where:
            found.append(errors.unknown("op", place, (op.name for op in ops)))
        if place and not names:
            found.append(errors.RegistryError(f"no backend is named for {place}"))
        found += [errors.unknown("backend", name, backends) for name in names if name not in backends]
        for op, name in ((op, name) for op in where for name in names if name in backends and name not in op.kernels):
            runs_on = ", ".join(sorted(op.kernels))
            problem = f"backend {name!r} has no kernel for {op.qualname}; it can run on: {runs_on}"
            found.append(errors.RegistryError(problem))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            found.append(errors.RegistryError(f"{', '.join(twice)} is named twice for {place or 'all ops'}"))
    return found


def known_op(name: str) -> str | None:
    """Return how an op's name is spelt, given in any case, or None."""
    return next((op.name for op in dispatcher.ops.values() if op.name.lower() == name.strip().lower()), None)


def lowered(names: Sequence[str]) -> Names:
    """Return backends' names as they are registered."""
    return tuple(name.strip().lower() for name in names)


def order_of(text: str) -> Names:
    """Split `flashinfer:triton`."""
    return tuple(name for name in text.split(":") if name.strip())


def parse(text: str, namespace: "Namespace") -> tuple[dict[str, Names], dict[str, Any], list[errors.RegistryError]]:
    """Read `flashinfer:triton,op=torch,setting=value`.

    Returns:
        The orders by op, the one without a name under `""`; the settings that the namespace's ops and the backends
        have; and an error for each entry that is none of these, or comes twice.
    """
    readers = _setting_readers(namespace)
    orders: dict[str, Names] = {}
    settings: dict[str, Any] = {}
    found: list[errors.RegistryError] = []
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    bare = [entry for entry in entries if "=" not in entry]
    if len(bare) > 1:
        problem = f"got the bare names {', '.join(bare)}, expected at most one; an order is written {':'.join(bare)}"
        return orders, settings, [errors.RegistryError(problem)]
    for key, word in [(key.strip(), word.strip()) for key, _, word in (e.partition("=") for e in entries if "=" in e)]:
        try:
            if key in orders or key.lower() in settings:
                raise errors.RegistryError(f"got {key} twice")
            if key.lower() in readers:
                settings[key.lower()] = readers[key.lower()](word)
            elif known_op(key) is None:
                kind = "op or setting" if readers else "op"
                raise errors.unknown(kind, key, [*(op.name for op in dispatcher.ops.values()), *readers])
            else:
                orders[key] = order_of(word)
        except errors.RegistryError as error:
            found.append(error)
    return orders | ({"": order_of(bare[0])} if bare else {}), settings, found


def _setting_readers(namespace: "Namespace") -> dict[str, Callable[[str], Any]]:
    """Return the settings that a namespace's ops and the backends have, each with what reads it from a string."""
    dispatcher.load_entry_points()
    readers = dict(namespace.settings)
    for backend in dispatcher.backends.values():
        for name, values in backend.choices.items():
            readers[f"{backend.name}_{name}"] = partial(_choice, f"{backend.name}_{name}", values)
    return readers


def _choice(name: str, values: Sequence[str], word: str) -> str:
    if word.lower() not in values:
        raise errors.RegistryError(f"{name}: got {word!r}, expected {', '.join(values)}")
    return word.lower()


def from_environment(namespace: "Namespace") -> Request:
    """Return what `<NAMESPACE>_BACKEND` and `<NAMESPACE>_CHECK` ask for."""
    variable = f"{namespace.name.upper()}_BACKEND"
    check = f"{namespace.name.upper()}_CHECK"
    try:
        orders, settings, wrong = parse(os.environ.get(variable, ""), namespace)
        for error in wrong:
            raise error
        found = make(variable, orders.pop("", ()), orders, settings)
        return found._replace(checks_values=os.environ.get(check) == "1")
    except errors.RegistryError as error:
        raise type(error)(f"{variable}: {error}") from None
