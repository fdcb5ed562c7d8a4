"""Graphs that callers capture by hand: which ops are in one, and what a swap says about it.

Inductor's own recordings are keyed by the selection token (token.py). A graph that a caller captures is not: it goes
on replaying the kernels that it holds. So an op remembers that it was captured, and on what.
"""

import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from mamba_ops.registry import _torch, errors

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op
    from mamba_ops.registry.snapshot import Snapshot

Settings = frozenset[tuple[str, Hashable]]


class Captured(NamedTuple):
    """What an op ran on when it was captured.

    Attributes:
        backend: its name.
        refused: backends that were asked before it and did not take the call.
        settings: those in force that its kernels may read.
        device: the type of the device.
    """

    backend: str
    refused: frozenset[str]
    settings: Settings
    device: str


_captured: dict["Op[...]", Captured] = {}
_own = threading.local()  # .depth: how many `noticing_swaps` the thread is in


def capture_query(device: torch.device) -> Callable[[], bool]:
    """Return the function that tells whether this thread's current stream captures, for tensors on a device.

    Every call asks. Where there are no graphs it is `bool`, which is False and built in. The device module's own
    question costs most of a microsecond, so the stream is looked at before: only side streams can capture.
    """
    asks = _asks(device)
    current = _torch.current_stream_of(device)
    if current is None or device.index is None:
        return asks
    index = device.index
    return lambda: current(index) != 0 and asks()


def refuse_swap(what: str) -> None:
    """Raise if this thread captures a graph."""
    if is_capturing():
        raise errors.RegistryError(
            f"{what} was called, or its block left, while this thread captures a graph, which would hold kernels of "
            "two selections; swap around the capture"
        )


def is_capturing() -> bool:
    """Return whether this thread's current stream captures, on any device that is in use."""
    asks = getattr(torch.cpu, "is_current_stream_capturing", None)  # played by tests; no CPU captures
    return bool((asks is not None and asks()) or _accelerator_query()())


def _asks(device: torch.device) -> Callable[[], bool]:
    asks: Callable[[], bool] = getattr(torch.get_device_module(device), "is_current_stream_capturing", bool)
    return asks


@cache
def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator()


def _accelerator_query() -> Callable[[], bool]:
    """Return what to ask the accelerator; once it is in use, that stays."""
    global _known_query
    if _known_query is None:
        accelerator = _accelerator()
        if accelerator is None or not torch.get_device_module(accelerator).is_initialized():
            return bool
        _known_query = _asks(accelerator)
    return _known_query


_known_query: Callable[[], bool] | None = None


@contextmanager
def noticing_swaps() -> Iterator[None]:
    """Within the block, this thread's captures belong to code that compares `generation()`, so no swap warns."""
    _own.depth = getattr(_own, "depth", 0) + 1
    try:
        yield
    finally:
        _own.depth -= 1


def note(
    op: "Op[...]",
    backend: str,
    refused: Iterable[str],
    settings: Settings,
    device: torch.device,
    *,
    has_token: bool,
) -> None:
    """Remember that a call of the op is being captured, unless the code that captures notices swaps."""
    if not getattr(_own, "depth", 0) and not (has_token and _torch.inductor_records(device)):
        _captured[op] = Captured(backend, frozenset(refused), settings, device.type)


def warn_of_swap(snapshot: "Snapshot") -> None:
    """Warn of captured ops that would now run on another backend, or with other settings; once of each capture."""
    for op, seen in list(_captured.items()):
        order = [kernel.backend.name for kernel in snapshot.order(op).kernels]
        taker = next((name for name in order if name == seen.backend or _may_take(op, name, seen)), None)
        other = taker if taker != seen.backend else "the same with other settings"
        if other is not None and (taker != seen.backend or settings_of(op, snapshot) != seen.settings):
            del _captured[op]
            sentence = (
                f"{op.qualname} was captured in a graph while it ran on {seen.backend}: replays go on running "
                f"{seen.backend}, and the backend asked for is {other} now. Capture again after the swap, or let "
                'torch.compile(mode="reduce-overhead") capture, which records anew after a swap'
            )
            warnings.warn(sentence, RuntimeWarning, stacklevel=4)


def settings_of(op: "Op[...]", snapshot: "Snapshot") -> Settings:
    """Return the settings of a snapshot, without those at their defaults, that an op's kernels may read."""
    own = {
        f"{k.backend.name}_{name}": values[0] for k in op.kernels.values() for name, values in k.backend.choices.items()
    }
    now = snapshot.settings.items()
    return frozenset((n, v) for n, v in now if v and own.get(n) != v and (n in own or op.has_default_arguments))


def _may_take(op: "Op[...]", name: str, seen: Captured) -> bool:
    """Return whether a backend may take the call that was captured: it did not refuse it, and has such a device."""
    devices = op.kernels[name].backend.devices
    return name not in seen.refused and (devices is None or seen.device in devices)


def forget(op: "Op[...] | None" = None) -> None:
    """Forget that an op was captured, or that any was: there is no such graph any more."""
    for captured in list(_captured) if op is None else [op]:
        _captured.pop(captured, None)
