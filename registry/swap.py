"""Swaps: another kernel runs from now on, for a block or for the process, and nothing is recompiled."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.registry import capture, errors, layouts, request, selection
from mamba_ops.registry.request import Request
from mamba_ops.registry.tables import lock

if TYPE_CHECKING:
    from mamba_ops.registry.request import Requester


def use_backend(backend: "str | Requester | None" = None, /, **named: str) -> AbstractContextManager[None]:
    """Within the block, run ops on the backends named, in the whole process; nothing is recompiled.

    A backend asked for by name never falls back: what it does not take raises, with the reason. An order of several,
    `"flashinfer:triton"`, goes on to the next, says so once, and never leaves the order.

    Args:
        backend: binds every op for which this backend has a kernel; other ops keep the default order. An op that is
            composed of others runs on them, on this backend where they have it. Or a `mamba_ops.BackendConfig`.
        named: `op_name="backend"` for single ops. Names are taken in any case.

    Raises:
        UnknownNameError: a name that nobody registered; the message lists the valid ones.
        RegistryError: the backend has no kernel for an op named, the call stands inside a traced region, or this thread
            captures a graph (also when the block is left).
    """
    if torch.compiler.is_dynamo_compiling():  # true in traced code alone, whatever other threads do
        _refuse_while_tracing("use_backend")
    orders = {op: request.order_of(names) for op, names in named.items()}
    if backend is None or isinstance(backend, str):
        return _activate(request.make("use_backend", request.order_of(backend or ""), orders))
    asked, more = _request_of(backend, "use_backend"), request.make("use_backend", (), orders)
    return _activate(asked._replace(ops={**asked.ops, **more.ops}))


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
    with lock:
        request.configured = asked
        selection.changed()
        selection.warn_of_captures()


def _request_of(config: "Requester", by: str, what: str = "use_backend") -> Request:
    if not hasattr(config, "request"):
        names = ", a backend's name" if what == "use_backend" else ""
        raise errors.RegistryError(f"{what}: got {config!r}, expected a BackendConfig{names} or None")
    return config.request(by)


def renew_caches(*caches: Tensor) -> None:
    """Zero caches and forget which backend wrote them, so that one that keeps another layout may.

    Recordings of torch.compile are made anew after it: those from before may run a kernel of the former layout.
    """
    with lock:
        layouts.renew(caches)
        selection.changed()


def _refuse_while_tracing(what: str) -> None:
    raise errors.swap_while_tracing(what)


# Marked as constant, it runs while Dynamo traces and its error is the user's; an error raised in traced code would only
# break the graph.
_refuse_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def _activate(asked: Request) -> Iterator[None]:
    capture.refuse_swap("use_backend()")
    with lock:
        request.active.append(asked)
        selection.changed()
        selection.warn_of_captures()
    try:
        yield
    finally:
        with lock:
            request.active[:] = [r for r in request.active if r is not asked]  # threads may leave in another order
            selection.changed()
    capture.refuse_swap("use_backend()")  # the block before is in force again; what was being captured is not usable
    with lock:
        selection.warn_of_captures()
