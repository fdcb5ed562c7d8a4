"""Graphs that callers capture by hand: which ops are in one, and what a swap says about it.

Inductor's own recordings are keyed by the selection token (token.py). A graph that a caller captures is not: it goes
on replaying the kernels that it holds. So the dispatcher remembers that an op was captured, and on what.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mamba_ops.registry import _torch, errors
from mamba_ops.registry.dispatcher import dispatcher, within

if TYPE_CHECKING:
    from mamba_ops.registry.backend import Backend
    from mamba_ops.registry.op import Op
    from mamba_ops.registry.snapshot import Snapshot

Settings = frozenset[tuple[str, Hashable]]


class Captured(NamedTuple):
    """What an op ran on when it was captured."""

    backend: str
    refused: frozenset[str]  # backends that were asked before it and did not take the call
    settings: Settings  # those in force that the op's kernels may read
    device: str  # its type


_notices: ContextVar[bool] = ContextVar("noticing_swaps", default=False)


def capture_query(device: torch.device) -> Callable[[], bool]:
    """Return the function that tells whether this thread's current stream captures, for tensors on a device.

    Every call asks. Where there are no graphs it is `bool`, which is False and built in. The device module's own
    question costs most of a microsecond, so the stream is looked at before: only side streams can capture.
    """
    asks = _query_of(torch.get_device_module(device))
    current, index = _torch.current_stream_of(device), device.index
    if current is None or index is None:
        return asks
    return lambda: current(index) != 0 and asks()


def _query_of(device_module: Any) -> Callable[[], bool]:
    query: Callable[[], bool] = vars(device_module).get("is_current_stream_capturing", bool)
    return query


@cache
def _device_modules() -> list[Any]:
    accelerator = torch.accelerator.current_accelerator()
    return [torch.cpu] + ([] if accelerator is None else [torch.get_device_module(accelerator)])


def is_capturing() -> bool:
    """Return whether this thread's current stream captures, on any device that is in use."""
    for module in _device_modules():  # noqa: SIM110  a loop is faster, and every swap asks twice
        if module.is_initialized() and _query_of(module)():
            return True
    return False


def refuse_swap(what: str) -> None:
    """Raise if this thread captures a graph."""
    if is_capturing():
        raise errors.RegistryError(
            f"{what} was called, or its block left, while this thread captures a graph, which would hold kernels of "
            "two selections; swap around the capture"
        )


@contextmanager
def noticing_swaps() -> Iterator[None]:
    """Within the block, this thread's captures belong to code that compares `generation()`, so no swap warns."""
    with within(_notices, True):
        yield


def note(op: "Op[...]", backend: str, refused: Iterable[str], device: torch.device, *, has_token: bool) -> None:
    """Remember that a call of the op is being captured, unless the code that captures notices swaps."""
    if not _notices.get() and not (has_token and _torch.inductor_records()):
        settings = _settings_of(op, dispatcher.current())
        dispatcher.captured[op] = Captured(backend, frozenset(refused), settings, device.type)


def warn_of_swap(snapshot: "Snapshot", *, stacklevel: int) -> None:
    """Warn of captured ops that would now run on another backend, or with other settings; once of each capture."""
    for op, seen in list(dispatcher.captured.items()):
        now = next((k.backend.name for k in snapshot.order(op).kernels if _may_take(k.backend, seen)), None)
        if now == seen.backend and _settings_of(op, snapshot) != seen.settings:
            now = "the same with other settings"
        if now not in (None, seen.backend):
            del dispatcher.captured[op]
            sentence = (
                f"{op.qualname} was captured in a graph while it ran on {seen.backend}: replays go on running "
                f"{seen.backend}, and the backend asked for is {now} now. Capture again after the swap, or let "
                'torch.compile(mode="reduce-overhead") capture, which records anew after a swap'
            )
            warnings.warn(sentence, RuntimeWarning, stacklevel=stacklevel)


def _settings_of(op: "Op[...]", snapshot: "Snapshot") -> Settings:
    """Return the settings of a snapshot, without those at their defaults, that an op's kernels may read."""
    backends = [kernel.backend for kernel in op.kernels.values()]
    own = {f"{backend.name}_{name}": values[0] for backend in backends for name, values in backend.choices.items()}
    reads_all = "default_arguments" in op.facets
    now = snapshot.settings.items()
    return frozenset((n, v) for n, v in now if v and own.get(n) != v and (n in own or reads_all))


def _may_take(backend: "Backend", seen: Captured) -> bool:
    """Return whether a backend may take the call that was captured: it did, or it has the device and was not asked."""
    return backend.name == seen.backend or (backend.name not in seen.refused and backend.is_for(seen.device))
