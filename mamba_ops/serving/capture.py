"""Graphs of a device, recorded and replayed: the one file of the package that knows which devices have them."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from mamba_ops.registry import noticing_swaps

T = TypeVar("T")


class Graphs(Protocol):
    """Who records."""

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record what a call launches, which does not run meanwhile; return its result and what replays it.

        The result's memory is that which every replay writes.
        """


class DeviceGraphs:
    """CUDA graphs, or XPU graphs.

    All share one pool of memory, so those that are replayed one after the other must have been recorded in that order.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._graph: Any = _graph_type(device)
        self._alive: WeakSet[Any] = WeakSet()

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See `Graphs`; the call must have run before, so that nothing is compiled or set up while it is recorded.

        Swaps of the backend do not warn of it: whoever replays compares `mamba_ops.registry.generation()`, as
        `PiecewiseRunner` does.
        """
        graph = self._graph()
        if not self._alive:  # a pool goes away with the last of its graphs
            self._pool = self._module.graph_pool_handle()
        with noticing_swaps(), self._module.device(self._device), self._module.graph(graph, pool=self._pool):
            result = call()
        self._alive.add(graph)
        return result, graph.replay


def graphs_of(device: torch.device) -> DeviceGraphs | None:
    """Return who records on a device; None where it has no graphs."""
    return None if _graph_type(device) is None else DeviceGraphs(device)


def _graph_type(device: torch.device) -> Any:
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return getattr(module, "CUDAGraph", None) or getattr(module, "XPUGraph", None)
