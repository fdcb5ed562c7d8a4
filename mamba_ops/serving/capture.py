"""Graphs of a device, recorded and replayed. Which devices have graphs is known in this file alone."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

import torch

from mamba_ops.registry import noticing_swaps

T = TypeVar("T")


class Graphs(Protocol):
    """Records the launches of a call, and replays them."""

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record what a call launches, without running it; return its result and a function that replays it.

        Every replay writes to the result's memory.
        """


class DeviceGraphs:
    """CUDA graphs, or XPU graphs.

    All share one pool of memory, so graphs must be replayed in the order in which they were recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._graph: Any = _graph_type(device)
        self._alive: WeakSet[Any] = WeakSet()

    def record(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See `Graphs`; the call must have run before, so that nothing is compiled or set up while it is recorded.

        A swap of the backend does not warn of the graph, so callers compare `mamba_ops.registry.generation()` before a
        replay, as `PiecewiseRunner` does.
        """
        graph = self._graph()
        if not self._alive:  # a pool is freed with the last of its graphs
            self._pool = self._module.graph_pool_handle()
        with noticing_swaps(), self._module.device(self._device), self._module.graph(graph, pool=self._pool):
            result = call()
        self._alive.add(graph)
        return result, graph.replay


def graphs_of(device: torch.device) -> DeviceGraphs | None:
    """Return the graphs of a device; None where it has none."""
    return None if _graph_type(device) is None else DeviceGraphs(device)


def _graph_type(device: torch.device) -> Any:
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return getattr(module, "CUDAGraph", None) or getattr(module, "XPUGraph", None)
