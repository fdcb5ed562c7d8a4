"""Stand-ins of what engines do with the pieces of a cut model; the engines themselves are not run."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compile_tests.test_splitting import DEVICE, HIDDEN, MIXING, SLOTS, EveryMixer
from mamba_ops import registry
from mamba_ops.registry import use_backend
from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR
from tests.tape import Recording

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_no_grad")


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):
        yield


def plan_of(computed: list[int], lengths: list[int]) -> Plan:
    return Plan.of(computed, lengths, [5, 0, 2], max_requests=SLOTS, device=DEVICE)


class ByRange(nn.Module):
    """A piece as vLLM 0.33 runs it: its first whole number is the number of tokens, which chooses what was compiled for
    just so many, or else for a range. What is compiled is the piece itself here."""

    def __init__(self, piece: nn.Module, sizes: list[int], ranges: list[tuple[int, int]]) -> None:
        super().__init__()
        self.piece, self.sizes, self.ranges = piece, sizes, ranges
        self.chosen: list[Any] = []

    def forward(self, *args: Any) -> Any:
        tokens = next(arg for arg in args if isinstance(arg, int))
        fitting = [size for size in self.sizes if size == tokens] or [r for r in self.ranges if r[0] <= tokens <= r[1]]
        self.chosen.append(fitting[0])
        return self.piece(*args)


def test_pieces_tell_the_number_of_tokens_by_which_an_engine_chooses() -> None:
    """One graph for all sizes; what is chosen is the same in all pieces of a step."""
    pieces: list[ByRange] = []
    graphs = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        module, cut = registry.split_graph(gm)
        for piece in cut:
            if not piece.ops:
                pieces.append(ByRange(piece.module, [8], [(1, 9), (10, 64)]))
                setattr(module, piece.name, pieces[-1])
        return module

    model = EveryMixer()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    steps = ([1, 1, 6], [1, 5, 4], [1, 2, 4], [1, 5, 40])
    for lengths in steps:
        plan = plan_of([3, 0, 8], lengths)
        hidden = torch.randn(plan.tokens, HIDDEN, device=DEVICE)
        model.forget()
        expected = model(hidden, plan)
        model.forget()
        torch._dynamo.mark_dynamic(hidden, 0)
        torch.testing.assert_close(compiled(hidden, plan), expected)
    assert len(graphs) == 1
    assert len(pieces) == len(MIXING) + 1
    assert all(piece.chosen == [8, (10, 64), (1, 9), (10, 64)] for piece in pieces)


class BreakableCapture:
    """A capture that ends at a function, runs it, and goes on after it, as vLLM 0.33 has it: a replay runs the function
    again with the arguments of then, and what comes after it reads the memory of then: `out=` says where that is."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, Callable[[], object]]] = []
        self._mode: Recording | None = None

    def breaks(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            if self._mode is None:
                return function(*args, **kwargs)
            self._end()
            result = function(*args, **kwargs)
            self.steps.append((name, lambda: function(*args, **{**kwargs, "out": result})))
            self._begin()
            return result

        return run

    def record(self, call: Callable[[], Tensor]) -> Tensor:
        self._begin()
        result = call()
        self._end()
        return result

    def replay(self) -> None:
        for _, step in self.steps:
            step()

    def _begin(self) -> None:
        self._mode = Recording()
        self._mode.__enter__()

    def _end(self) -> None:
        mode, self._mode = self._mode, None
        assert mode is not None
        mode.__exit__(None, None, None)
        self.steps.append(("segment", mode.play))


@pytest.mark.skipif(ACCELERATOR is not None, reason="the capture is played, on a CPU")
def test_a_capture_may_be_broken_at_the_mixing_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """They write to memory of the caller, so segments after them find it there, in replays for other batches, too."""
    model, capture = EveryMixer(), BreakableCapture()
    for layer, name in zip(model.layers, MIXING, strict=True):
        module, front = importlib.import_module(type(layer).__module__), name.partition("::")[2]
        monkeypatch.setattr(module, front, capture.breaks(name, getattr(module, front)))
    plan, hidden = plan_of([3, 0, 8], [1, 5, 4]), torch.randn(10, HIDDEN)
    result = capture.record(lambda: model(hidden, plan))
    names = [name for name, _ in capture.steps]
    assert names == ["segment", *(part for op in MIXING for part in (op, "segment"))]

    for computed, lengths in (([3, 0, 8], [1, 5, 4]), ([3, 7, 0], [1, 1, 8]), ([0, 0, 0], [2, 2, 6])):
        other, inputs = plan_of(computed, lengths), torch.randn(10, HIDDEN)
        model.forget()
        expected = model(inputs, other)
        model.forget()
        hidden.copy_(inputs)
        for mine, new in zip(plan.tensors, other.tensors, strict=True):
            if mine is not None:
                mine.copy_(new)
        capture.replay()
        torch.testing.assert_close(result, expected)
