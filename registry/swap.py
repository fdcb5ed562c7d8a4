"""Swaps: another kernel runs from now on, for a block or for the process, and nothing is recompiled."""

from contextlib import ContextDecorator
from functools import cache
from typing import TYPE_CHECKING

import torch

from mamba_ops.registry import _torch, capture, errors, request, token
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.snapshot import Request, Requests

if TYPE_CHECKING:
    from mamba_ops.registry.request import Requester


class _Swap(ContextDecorator):
    """What `use_backend` returns: a block, or a decorator."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> None:
        capture.refuse_swap("use_backend()")
        self._activate(dispatcher.active.get().plus(self._request))

    def __exit__(self, *_: object) -> None:
        self._activate(dispatcher.active.get().minus(self._request))
        capture.refuse_swap("use_backend()")  # the block was left all the same; what is being captured is not usable

    def _activate(self, active: Requests) -> None:
        dispatcher.active.set(active)
        snapshot = dispatcher.snapshot(active)
        token.follow(snapshot)
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
    orders = {op: request.order_of(names) for op, names in named.items()}
    return request.make("use_backend", request.order_of(backend), orders)


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
