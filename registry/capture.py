"""Graphs that callers capture by hand: which ops are in one, and what a swap says about it.

Inductor's own recordings are keyed by the selection token (tokens.py). A graph that somebody captures is not: it goes
on replaying the kernels that it holds. So an op remembers that it was captured, and on what.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from mamba_ops.registry import errors

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op

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


def question(device: torch.device) -> Callable[[], bool]:
    """Return the function that tells whether this thread's current stream captures, for tensors on a device.

    Every call asks. Where there are no graphs it is `bool`, which is False and built in. The device module's own
    question costs most of a microsecond, so the stream is looked at before: none but side streams can capture.
    """
    asks: Callable[[], bool] = getattr(torch.get_device_module(device), "is_current_stream_capturing", bool)
    current: Callable[[int], int] | None = getattr(torch._C, f"_{device.type}_getCurrentRawStream", None)
    if current is None or device.index is None:
        return asks
    index = device.index
    return lambda: current(index) != 0 and asks()


def refuse_swap(what: str) -> None:
    """Raise if this thread captures a graph."""
    if is_capturing():
        raise errors.swap_while_capturing(what)


def is_capturing() -> bool:
    """Return whether this thread's current stream captures, on any device that is in use."""
    accelerator = torch.accelerator.current_accelerator()
    devices = [torch.device("cpu"), *([accelerator] if accelerator and _in_use(accelerator) else [])]
    return any(question(device)() for device in devices)


def _in_use(accelerator: torch.device) -> bool:
    return bool(torch.get_device_module(accelerator).is_initialized())


@contextmanager
def noticing_swaps() -> Iterator[None]:
    """Within the block, this thread's captures are those of somebody who compares `generation()`, so no swap warns."""
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
    """Remember that a call of the op is being captured, unless whoever captures will notice a swap."""
    if not getattr(_own, "depth", 0) and not (has_token and _inductor_records(device)):
        _captured[op] = Captured(backend, frozenset(refused), settings, device.type)


def _inductor_records(device: torch.device) -> bool:
    """Return whether it is Inductor that captures: it has a stream of its own for that."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # it has never recorded anything in this thread
        return False
    return manager is not None and torch.get_device_module(device).current_stream(device) == manager.stream


def warn(order: "Callable[[Op[...]], list[str]]", settings: "Callable[[Op[...]], Settings]") -> None:
    """Say which captured ops would now run on another backend; each capture is spoken of once.

    Args:
        order: the backends that a call of an op is now offered to, in order.
        settings: those in force that an op's kernels may read.
    """
    for op, seen in list(_captured.items()):
        taker = next((name for name in order(op) if name == seen.backend or _may_take(op, name, seen)), None)
        other = taker if taker != seen.backend else "the same with other settings"
        if other is not None and (taker != seen.backend or settings(op) != seen.settings):
            del _captured[op]
            warnings.warn(errors.captured(op.qualname, seen.backend, other), RuntimeWarning, stacklevel=5)


def _may_take(op: "Op[...]", name: str, seen: Captured) -> bool:
    """Return whether a backend may take the call that was captured: it did not refuse it, and has such a device."""
    devices = op.kernels[name].backend.devices
    return name not in seen.refused and (devices is None or seen.device in devices)


def forget(op: "Op[...] | None" = None) -> None:
    """Forget that an op was captured, or that any was: there is no such graph any more."""
    for captured in list(_captured) if op is None else [op]:
        _captured.pop(captured, None)
