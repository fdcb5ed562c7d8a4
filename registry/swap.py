"""Swaps: another kernel runs from now on, for a block or for the process, and nothing is recompiled."""

from collections.abc import Hashable
from contextlib import AbstractContextManager, ContextDecorator
from typing import TYPE_CHECKING, Any

import torch

from mamba_ops.registry import _torch, capture, errors, request
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.snapshot import Request, Requests

if TYPE_CHECKING:
    from mamba_ops.registry.request import Requester


class _Swap(ContextDecorator, AbstractContextManager[None]):
    """What `use_backend` returns: a block, or a decorator."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._entered: list[tuple[Requests, Requests]] = []

    def _recreate_cm(self) -> "_Swap":
        return _Swap(self._request)

    def __enter__(self) -> None:
        capture.refuse_swap("use_backend()")
        outer = dispatcher.active
        inner = outer.plus(self._request)
        self._entered.append((outer, inner))
        dispatcher.activate(inner)

    def __exit__(self, *_: object) -> None:
        outer, inner = self._entered.pop()
        active = dispatcher.active
        dispatcher.activate(outer if active is inner else active.minus(self._request))
        capture.refuse_swap("use_backend()")  # the block was left all the same; what is being captured is not usable


_parsed: dict[Hashable, Request] = {}  # requests by the words of the call; forgotten when a name is registered
dispatcher.listeners.append(_parsed.clear)


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
    if backend is not None and not isinstance(backend, str):
        requested = _request_of(backend, "use_backend")
        more = request.make("use_backend", (), _orders(named))
        return _Swap(requested._replace(ops=tuple({**dict(requested.ops), **dict(more.ops)}.items())))
    words = backend, *named.items()
    if (found := _parsed.get(words)) is None:
        found = _parsed[words] = request.make("use_backend", request.order_of(backend or ""), _orders(named))
    return _Swap(found)


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


def _orders(named: dict[str, str]) -> dict[str, Any]:
    return {op: request.order_of(names) for op, names in named.items()}


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
    asked = None if config is None else _request_of(config, type(config).__name__, "configure")
    capture.refuse_swap("configure()")
    dispatcher.configure(asked)


def _request_of(config: "Requester", by: str, what: str = "use_backend") -> Request:
    if not hasattr(config, "request"):
        names = ", a backend's name" if what == "use_backend" else ""
        raise errors.RegistryError(f"{what}: got {config!r}, expected a BackendConfig{names} or None")
    return config.request(by)


@_torch.constant
def _refuse_while_tracing(what: str) -> None:
    # Marked as constant, it runs while Dynamo traces and its error is the user's; an error raised in traced code would
    # only break the graph.
    raise errors.swap_while_tracing(what)
