"""Graphs captured by hand: an op remembers, a swap warns or is refused. The capture is played: no CPU has one.

`compile_tests/test_swap_graphs.py` has the same with real graphs, on a GPU.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mamba_ops import registry
from mamba_ops.registry import Op, RegistryError, _torch, noticing_swaps, use_backend
from tests.registry.toys import adapter, call

Capture = Callable[[], Any]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """Makes the CPU a device whose current stream captures within the block."""
    capturing = [False]
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: capturing[0], raising=False)

    @contextmanager
    def block() -> Iterator[None]:
        capturing[0] = True
        yield
        capturing[0] = False

    return block


@pytest.fixture
def others(add: Op[...], backend: Any) -> None:
    for mark, name in enumerate(("one", "two"), 2):
        backend(name, priority=-mark).implements(add)(adapter(mark))


SENTENCE = (
    "toys::add was captured in a graph while it ran on torch: replays go on running torch, and the backend asked for "
    'is two now. Capture again after the swap, or let torch.compile(mode="reduce-overhead") capture, which records '
    "anew after a swap"
)


@pytest.mark.usefixtures("others")
def test_a_swap_warns_once_of_an_op_that_was_captured(add: Op[...], capture: Capture) -> None:
    call(add)  # the same call, known before
    with capture():
        assert call(add) == 1.0
    with pytest.warns(RuntimeWarning) as said, use_backend("two"):
        assert call(add) == 3.0
    assert [str(warning.message) for warning in said] == [SENTENCE]
    assert said[0].filename == __file__
    with use_backend("one"):  # it has been said
        pass
    with capture():
        call(add)
    with pytest.warns(RuntimeWarning, match="the backend asked for is one now"), use_backend(add="one"):
        pass


@pytest.mark.usefixtures("others")
def test_leaving_the_block_in_which_it_was_captured_is_a_swap_too(add: Op[...], capture: Capture) -> None:
    block = use_backend("two")
    block.__enter__()
    with capture():
        assert call(add) == 3.0
    with use_backend("two"):  # the same
        pass
    with pytest.warns(RuntimeWarning, match="replays go on running two, and the backend asked for is torch now"):
        block.__exit__(None, None, None)


@pytest.mark.usefixtures("others")
def test_what_does_not_change_the_kernel_warns_of_nothing(add: Op[...], backend: Any, capture: Capture) -> None:
    backend("far", devices=["cuda"], priority=9).implements(add)(adapter(4))
    backend("picky", priority=8).implements(add, unsupported=lambda x: "takes none")(adapter(5))
    with pytest.warns(RuntimeWarning, match="picky does not take the call: takes none"), capture():
        call(add)  # on torch, for picky refuses
    with use_backend("torch"), use_backend("far:torch"), use_backend("picky:torch"):
        pass
    with noticing_swaps(), capture():  # by somebody who compares generation()
        call(add)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.dispatcher.dispatcher.captured.clear()
        with noticing_swaps(), capture():
            call(add)
        with use_backend("one"):
            pass


@pytest.mark.usefixtures("others")
def test_a_swap_during_a_capture_is_refused(add: Op[...], capture: Capture) -> None:
    says = (
        "{} was called, or its block left, while this thread captures a graph, which would hold kernels of two "
        "selections; swap around the capture"
    )
    refused = pytest.raises(RegistryError, match=f"^{re.escape(says.format('use_backend()'))}$")
    with capture():
        with refused, use_backend("one"):
            pass
        with pytest.raises(RegistryError, match=f"^{re.escape(says.format('configure()'))}$"):
            registry.configure(None)
    with use_backend("two"):
        block = use_backend("one")
        block.__enter__()
        with capture(), refused:
            block.__exit__(None, None, None)
        assert call(add) == 3.0  # it was left all the same


@pytest.mark.usefixtures("others")
def test_a_recording_holds_the_selection_that_its_token_names(add: Op[...], capture: Capture) -> None:
    """Whatever another thread has swapped between the start of a compiled call and its kernels."""
    token = registry.token.token
    with use_backend("two"):
        two = token(torch.empty(0))
    total, x, out = torch.zeros(3), torch.ones(3), torch.empty(3)
    with use_backend("one"):
        one = token(torch.empty(0))
        for named, mark in ((one, 2.0), (two, 3.0), (one, 2.0)):
            with noticing_swaps(), capture():
                add.overload(total, x, bias=None, scale=1.0, output=out, selection=named)
            assert float(out[0]) == mark
        add.overload(total, x, bias=None, scale=1.0, output=out, selection=two)  # not captured: the one in force
        assert float(out[0]) == 2.0


def test_what_inductor_records_is_told_by_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that records alone, whatever made the recording's stream."""
    trees = importlib.import_module("torch._inductor.cudagraph_trees")

    class Node:
        def _record(self) -> list[bool]:
            with ThreadPoolExecutor(1) as other:
                return [_torch.inductor_records(), other.submit(_torch.inductor_records).result()]

    monkeypatch.setattr(trees, "CUDAGraphNode", Node)
    assert Node()._record() == [True, False]
    assert not _torch.inductor_records()
