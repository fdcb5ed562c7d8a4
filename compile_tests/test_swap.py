"""Backends change under compiled graphs: nothing recompiles, the right kernel runs, and no recording goes stale."""

import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from compile_tests.conftest import MARK
from compile_tests.steps import conv_step, ssm_step
from compile_tests.test_ops import graphs
from mamba_ops import BackendConfig, configure
from mamba_ops.registry import (
    Backend,
    NoBackendError,
    mark_splitting,
    record_selections,
    renew_caches,
    split_graph,
    use_backend,
)
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


def step(x: Tensor, cache: Tensor, weight: Tensor, slots: Tensor) -> Tensor:
    return mamba_ops.causal_conv1d_update(x, cache, weight, slots=slots) * 2


def marked(out: Tensor) -> bool:
    return bool((out > MARK).all())


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_swap_recompiles_nothing(marker: Backend, dynamic: bool | None, mode: str) -> None:
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, mode=mode)
    sample = conv_step(5)
    with record_selections() as record:
        for backend in ("torch", "marker", "torch", "marker"):
            eager, other = sample.clone(), sample.clone()
            with use_backend(backend):
                expected = step(*eager.args, **eager.kwargs)
                out = compiled(*other.args, **other.kwargs)
            assert marked(out) == (backend == "marker")
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(other.args[1], eager.args[1], rtol=0, atol=0)
    assert [r.backend for r in record] == ["torch"] * 2 + ["marker"] * 2 + ["torch"] * 2 + ["marker"] * 2
    assert graphs() == 1


def test_a_new_default_reaches_compiled_code(marker: Backend) -> None:
    """Registering a better kernel is a swap too."""
    compiled = torch.compile(step, fullgraph=True)
    sample = conv_step(5)
    assert not marked(compiled(*sample.clone().args, **sample.kwargs))
    marker.priority = 100
    with use_backend("torch"):
        pass
    assert marked(compiled(*sample.clone().args, **sample.kwargs))
    assert graphs() == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_swap_inside_a_traced_region_is_refused(marker: Backend, fullgraph: bool) -> None:
    def inside(*args: Tensor, slots: Tensor) -> Tensor:
        with use_backend("marker"):
            return step(*args, slots=slots)

    sample = conv_step(5)
    says = "use_backend() was called inside a region that torch.compile traces; call it around the compiled function"
    with pytest.raises(Exception, match=re.escape(says)):
        torch.compile(inside, fullgraph=fullgraph)(*sample.clone().args, **sample.kwargs)
    assert marked(inside(*sample.clone().args, **sample.kwargs))


def test_two_threads_compile_and_swap(marker: Backend) -> None:
    """Whatever the interleaving, every result is one backend's or the other's, and all agree in the cache."""
    problems: list[BaseException] = []
    # In torch 2.11 a compiled function must not be called while any thread traces: there they compile by turns.
    by_turns = TORCH < (2, 12)
    turn, compiled_both = threading.Lock() if by_turns else nullcontext(), threading.Barrier(2, timeout=120)

    def work(backend: str) -> None:
        try:
            sample = conv_step(5 + len(backend))
            compiled = torch.compile(lambda *a, **k: step(*a, **k), fullgraph=True)
            with torch.no_grad():  # grad mode is a thread's own
                if by_turns:
                    with turn:
                        compiled(*sample.clone().args, **sample.kwargs)
                    compiled_both.wait()
                for _ in range(10):
                    eager, other = sample.clone(), sample.clone()
                    with use_backend(backend):
                        expected = step(*eager.args, **eager.kwargs)
                        out = compiled(*other.args, **other.kwargs)
                    shift = (out - expected).abs()
                    assert bool(torch.isclose(shift, shift.new_tensor([0.0, 2 * MARK])[:, None, None]).any(0).all())
                    torch.testing.assert_close(other.args[1], eager.args[1], rtol=0, atol=0)
        except BaseException as error:
            problems.append(error)
            compiled_both.abort()

    threads = [threading.Thread(target=work, args=[name]) for name in ("torch", "marker")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert graphs() == 2


def test_the_token_names_the_selection(marker: Backend) -> None:
    """Equal selections have equal tokens: the graph's input has the same size again after swapping back."""
    sizes = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        [place] = [i for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.numel() == 0]

        def run(*args: Tensor) -> Any:
            sizes.append(args[place].shape)
            return gm(*args)

        return run

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    sample = conv_step(5)
    for name in ("torch", "marker", "torch", "marker"):
        with use_backend(name):
            compiled(*sample.clone().args, **sample.kwargs)
    assert sizes[0] == sizes[2] != sizes[1] == sizes[3]
    assert all(size[1] == 0 and size[0] > 10**6 and size[0] % 2 for size in sizes)


def test_nested_blocks_and_configurations_swap_compiled_code(marker: Backend) -> None:
    """The innermost request that names the op decides; nothing is recompiled, and equal selections are one."""
    compiled = torch.compile(step, fullgraph=True)
    sample = conv_step(5)
    tokens = []

    def check(mark: bool) -> None:
        eager, other = sample.clone(), sample.clone()
        expected, out = step(*eager.args, **eager.kwargs), compiled(*other.args, **other.kwargs)
        assert marked(out) == mark
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(other.args[1], eager.args[1], rtol=0, atol=0)
        token = mamba_ops.registry.token.token(torch.empty(0, device=DEVICE))
        assert token is not None
        tokens.append(token.shape[0])

    with record_selections() as record:
        with use_backend("torch"):
            check(False)
            with use_backend("marker"):
                check(True)
                with use_backend(causal_conv1d_update="torch"):
                    check(False)
                with use_backend(selective_state_update="torch"):  # says nothing of this op
                    check(True)
                check(True)
            check(False)
        configure(BackendConfig("marker:torch"))
        try:
            check(True)
            with use_backend("torch"):
                check(False)
            check(True)
        finally:
            configure(None)
    assert [run.backend for run in record[::2]] == [run.backend for run in record[1::2]]  # eager and compiled
    assert len(record) == 2 * 9
    outer, inner, back = tokens[0], tokens[1], tokens[2]
    assert tokens[:6] == [outer, inner, back, inner, inner, outer]
    assert back == outer
    assert tokens[6] == tokens[8] != tokens[7]
    assert graphs() == 1


def test_pieces_of_a_split_graph_follow_the_selection(marker: Backend) -> None:
    """As engines run it: the op by itself, between pieces that do not hold it."""
    pieces = []

    def engine(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        split = split_graph(gm)
        pieces.extend(piece.ops for piece in split.subgraphs)
        return split.module

    mark_splitting(mamba_ops.causal_conv1d_update)
    try:
        compiled = torch.compile(step, fullgraph=True, backend=engine)
        sample = conv_step(5)
        with record_selections() as record:
            for backend in ("torch", "marker", "torch", "marker"):
                eager, other = sample.clone(), sample.clone()
                with use_backend(backend):
                    expected, out = step(*eager.args, **eager.kwargs), compiled(*other.args, **other.kwargs)
                assert marked(out) == (backend == "marker")
                torch.testing.assert_close(out, expected)
    finally:
        mark_splitting(mamba_ops.causal_conv1d_update, False)
    assert [run.backend for run in record] == ["torch"] * 2 + ["marker"] * 2 + ["torch"] * 2 + ["marker"] * 2
    assert ("mamba_ops::causal_conv1d_update",) in pieces
    assert len(pieces) == 3
    assert graphs() == 1


@pytest.mark.usefixtures("marker")
def test_compiled_code_is_not_given_a_cache_in_another_layout() -> None:
    kernel = mamba_ops.causal_conv1d_update.kernels["marker"].function
    packed = Backend("packed", devices=None, priority=-20)
    try:
        packed.implements(mamba_ops.causal_conv1d_update, layouts={"conv_state": "another order"})(kernel)
        compiled = torch.compile(step, fullgraph=True)
        sample = conv_step(5).clone()
        assert not marked(compiled(*sample.args, **sample.kwargs))
        before = sample.args[1].clone()
        with use_backend("packed"):
            with pytest.raises(NoBackendError, match=r"keeps conv_state in another order, and \w+ wrote this one"):
                compiled(*sample.args, **sample.kwargs)
            assert torch.equal(sample.args[1], before)
            renew_caches(sample.args[1])
            assert marked(compiled(*sample.args, **sample.kwargs))
        with pytest.raises(NoBackendError, match="packed wrote this one in another order"), use_backend("torch"):
            compiled(*sample.args, **sample.kwargs)
        assert graphs() == 1
    finally:
        packed.remove()


def test_ssm_and_conv_swap_apart(marker: Backend) -> None:
    """`use_backend(op="name")` moves that op alone."""
    conv, ssm = conv_step(5), ssm_step(5)

    def both(x: Tensor, cache: Tensor, weight: Tensor, *rest: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return step(x, cache, weight, slots), mamba_ops.selective_state_update(*rest, slots=slots)

    compiled = torch.compile(both, fullgraph=True)
    with use_backend("torch"), use_backend(causal_conv1d_update="marker"), record_selections() as record:
        c, s = conv.clone(), ssm.clone()
        compiled(*c.args, *s.args, slots=c.kwargs["slots"])
    assert record == [
        ("mamba_ops::causal_conv1d_update", "marker"),
        ("mamba_ops::selective_state_update", "torch"),
    ]
