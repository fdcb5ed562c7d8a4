"""Which pool a device's graphs share, with a stand-in of its module; a real capture where there is a device."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

import pytest
import torch

from mamba_ops.serving import DeviceGraphs, graphs_of
from tests.conftest import ACCELERATOR


class FakeModule:
    """What DeviceGraphs uses of torch.cuda or torch.xpu; it records nothing."""

    class XPUGraph:
        def replay(self) -> None:
            pass

    def __init__(self) -> None:
        self._numbers, self.pools = count(), []

    def graph_pool_handle(self) -> int:
        return next(self._numbers)

    def device(self, device: torch.device) -> Any:
        return nullcontext()

    @contextmanager
    def graph(self, graph: Any, pool: int) -> Iterator[None]:
        self.pools.append(pool)
        yield


def test_a_pool_is_used_as_long_as_one_of_its_graphs_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeModule()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    graphs = graphs_of(torch.device("xpu"))
    assert isinstance(graphs, DeviceGraphs)
    first, second = graphs.record(lambda: 1), graphs.record(lambda: 2)
    assert (first[0], second[0], module.pools) == (1, 2, [0, 0])
    del first
    third = graphs.record(lambda: 3)
    del second, third
    graphs.record(lambda: 4)
    assert module.pools == [0, 0, 0, 1]
    with pytest.raises(KeyError):
        graphs.record(lambda: {}["in the middle"])
    kept = graphs.record(lambda: 5)
    assert module.pools == [0, 0, 0, 1, 2, 3]
    del kept


def test_a_cpu_has_no_graphs() -> None:
    assert graphs_of(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_device_records_and_replays() -> None:
    assert ACCELERATOR is not None
    graphs = graphs_of(ACCELERATOR)
    assert graphs is not None
    x = torch.ones(3, device=ACCELERATOR)
    for _ in range(2):  # the second time, all graphs of the first pool are gone
        y, replay = graphs.record(lambda: x * 2)
        x.fill_(5)
        replay()
        assert y.tolist() == [10, 10, 10]
        del y, replay
