"""Backends change under captured graphs, on a GPU: Inductor's own recordings, partitions, and graphs captured by hand.

What can be shown of this without one is in test_swap.py and tests/registry/test_capture.py.
"""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mamba_ops
from compile_tests.steps import conv_step
from compile_tests.test_swap import marked, step
from mamba_ops import configure, record_selections, use_backend
from mamba_ops.commands.watch import CompilerWatch, watch_compiler
from mamba_ops.registry import Backend, NoBackendError, RegistryError, renew_caches
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
FIRST, AGAIN = (1, 2), (0, 0)  # recordings, and runs from Python: to warm up and to record; then replays alone

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "no_grad")]


class Seen(NamedTuple):
    """What a few calls on one backend did."""

    recordings: int
    runs: int


class Pair:
    """A compiled step beside the eager one, each with a cache of its own; both go on from call to call."""

    def __init__(self, compiled: Callable[..., Tensor], rows: int = 5) -> None:
        self.compiled = compiled
        sample = conv_step(rows)
        (self.x, self.cache, self.weight), self.slots = sample.args, sample.kwargs["slots"]
        self.eager_cache = self.cache.clone()
        torch._dynamo.mark_static_address(self.cache, guard=False)

    def run(self, backend: str, watch: CompilerWatch, *, times: int = 4, check: bool = True) -> Seen:
        """Call both; the numbers must be this backend's and agree, in the output and in the cache."""
        recordings = watch.recordings
        runs = 0
        for _ in range(times):
            torch.compiler.cudagraph_mark_step_begin()
            with record_selections() as record:
                out = self.compiled(self.x, self.cache, self.weight, self.slots).clone()
            runs += len(record)
            expected = step(self.x, self.eager_cache, self.weight, self.slots)
            if check:
                assert marked(out) == (backend == "marker")
                torch.testing.assert_close(out, expected)
            torch.testing.assert_close(self.cache, self.eager_cache, rtol=0, atol=0)
        return Seen(watch.recordings - recordings, runs)


def compiled_step(**options: Any) -> Callable[..., Tensor]:
    return torch.compile(lambda *args: step(*args), fullgraph=True, **options)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.usefixtures("marker")
def test_recordings_follow_the_selection(mode: str, dynamic: bool | None) -> None:
    """Every swap is seen, what was recorded before is replayed, nothing is skipped or recompiled."""
    pair = Pair(compiled_step(mode=mode, dynamic=dynamic))
    seen = []
    with watch_compiler() as watch:
        for backend in ("triton", "marker", "triton", "marker", "triton"):
            with use_backend(backend):
                seen.append(pair.run(backend, watch))
    assert seen == [FIRST, FIRST, AGAIN, AGAIN, AGAIN]
    assert (watch.graphs, watch.recompiles) == (1, 0)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("marker")
def test_nested_and_configured_selections_have_recordings_of_their_own() -> None:
    """Equal selections share one, however they were asked for; other ops' backends make another."""
    pair = Pair(compiled_step(mode="reduce-overhead"))
    with watch_compiler() as watch:
        with use_backend("triton"):
            seen = [pair.run("triton", watch)]
            with use_backend("marker"):
                seen.append(pair.run("marker", watch))
                with use_backend(causal_conv1d_update="triton"):
                    seen.append(pair.run("triton", watch))
                seen.append(pair.run("marker", watch))
            seen.append(pair.run("triton", watch))
        try:
            configure(mamba_ops.BackendConfig("marker"))
            seen.append(pair.run("marker", watch))
            with use_backend("triton"):
                pair.run("triton", watch)
            seen.append(pair.run("marker", watch))
        finally:
            configure(None)
    assert seen == [FIRST, FIRST, AGAIN, AGAIN, AGAIN, FIRST, AGAIN]
    assert (watch.graphs, watch.recompiles) == (1, 0)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("marker")
def test_partitioned_graphs_run_the_op_between_their_pieces() -> None:
    """Cut there, the op is in no recording: every call runs it, on the backend of the moment."""
    op = "mamba_ops::causal_conv1d_update"
    with torch._inductor.config.patch({"graph_partition": True, "custom_should_partition_ops": [op]}):
        pair = Pair(compiled_step(mode="reduce-overhead"))
        with watch_compiler() as watch:
            for backend in ("triton", "marker", "triton", "marker"):
                with use_backend(backend):
                    assert pair.run(backend, watch).runs == 4
    assert (watch.graphs, watch.recompiles) == (1, 0)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("marker")
def test_recordings_stay_true_while_another_thread_swaps() -> None:
    """Whenever it swaps, also between the start of a recording and its kernels: each goes by what its key names."""
    pair, other = Pair(compiled_step(mode="reduce-overhead")), conv_step(7).clone()
    step(*other.args, **other.kwargs)
    done = threading.Event()

    def swap() -> None:
        with torch.no_grad():
            while not done.is_set():
                for backend in ("marker", "triton"):
                    with use_backend(backend):
                        step(*other.args, **other.kwargs)

    thread = threading.Thread(target=swap)
    with watch_compiler() as watch:
        thread.start()
        try:
            for _ in range(20):
                pair.run("either", watch, times=5, check=False)
        finally:
            done.set()
            thread.join()
        for backend in ("triton", "marker", "triton"):
            with use_backend(backend):
                pair.run(backend, watch)
    assert (watch.graphs, watch.recompiles) == (1, 0)


# -- graphs captured by hand ------------------------------------------------------------------------------------------


def captured(call: Callable[[], Tensor], *, same_stream: bool) -> tuple[Any, Tensor]:
    """Warm up and capture, on one stream or on two; return the graph and its output."""
    module = torch.get_device_module(DEVICE)
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    with module.stream(stream):
        for _ in range(2):
            call()
    module.current_stream().wait_stream(stream)
    graph = module.CUDAGraph()
    with module.graph(graph, **({"stream": stream} if same_stream else {})):
        out = call()
    return graph, out


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("same_stream", [False, True])
@pytest.mark.usefixtures("marker")
def test_a_swap_warns_of_what_was_captured_by_hand(compiled: bool, same_stream: bool) -> None:
    pair = Pair(compiled_step() if compiled else step)
    call = partial(pair.compiled, pair.x, pair.cache, pair.weight, pair.slots)
    graph, out = captured(call, same_stream=same_stream)
    says = "mamba_ops::causal_conv1d_update was captured in a graph while it ran on triton: .* is marker now"
    swapped = use_backend("marker")
    with pytest.warns(RuntimeWarning, match=says):
        swapped.__enter__()
    graph.replay()
    assert not marked(out)  # as the warning says
    swapped.__exit__(None, None, None)
    with use_backend("marker"):  # it is said once
        pass


def test_a_swap_during_a_capture_is_refused() -> None:
    pair = Pair(step)
    pair.compiled(pair.x, pair.cache, pair.weight, pair.slots)
    module = torch.get_device_module(DEVICE)
    with module.graph(module.CUDAGraph()):
        out = step(pair.x, pair.cache, pair.weight, pair.slots)
        refused = pytest.raises(RegistryError, match="captures a graph, which would hold kernels of two selections")
        with refused, use_backend("torch"):
            pass
        with pytest.raises(RegistryError, match="swap around the capture"):
            configure(mamba_ops.BackendConfig("triton"))
    assert out.shape == pair.x.shape


# -- cache layouts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(marker: Backend) -> Iterator[Backend]:
    """Leaves the same mark, and keeps the cache in a layout of its own (as it says)."""
    backend = Backend("packed", devices=None, priority=-20)
    kernel = mamba_ops.causal_conv1d_update.kernels["marker"].function
    backend.implements(mamba_ops.causal_conv1d_update, layouts={"conv_state": "another order"})(kernel)
    yield backend
    backend.remove()


@pytest.mark.usefixtures("packed")
def test_what_was_recorded_before_caches_were_renewed_is_not_replayed() -> None:
    """It may hold a kernel of the former layout, and no check runs in a replay."""
    pair = Pair(compiled_step(mode="reduce-overhead"))
    with watch_compiler() as watch:
        for backend, shown in (("triton", "triton"), ("packed", "marker"), ("triton", "triton")):
            renew_caches(pair.cache, pair.eager_cache)
            with use_backend(backend):
                assert pair.run(shown, watch) == FIRST
                assert pair.run(shown, watch) == AGAIN
    assert (watch.graphs, watch.recompiles) == (1, 0)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.usefixtures("packed")
def test_a_swap_to_another_cache_layout_is_refused_under_cuda_graphs() -> None:
    """Inductor's CUDA graphs do not survive an exception in a warm-up, so nothing is called after it."""
    pair = Pair(compiled_step(mode="reduce-overhead"))
    with watch_compiler() as watch, use_backend("triton"):
        pair.run("triton", watch)
    before = pair.cache.clone()
    torch.compiler.cudagraph_mark_step_begin()
    with use_backend("packed"), pytest.raises(NoBackendError, match="keeps conv_state in another order, and triton wr"):
        pair.compiled(pair.x, pair.cache, pair.weight, pair.slots)
    assert torch.equal(pair.cache, before)
