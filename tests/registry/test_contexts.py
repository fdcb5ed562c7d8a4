"""Selections in threads, asyncio tasks, forks and pickles: each context has its own, and no call runs on another's."""

import asyncio
import contextvars
import multiprocessing
import os
import pickle
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import BackendConfig
from mamba_ops.registry import Backend, Op, RegistryError, configure, errors, explain, no_jit, use_backend
from mamba_ops.registry.jit import announce
from tests.conftest import ACCELERATOR
from tests.harness import environment
from tests.registry.toys import adapter

DEVICE = ACCELERATOR or torch.device("cpu")
NAMES = {"one": 11.0, "two": 12.0, "three": 13.0, "four": 14.0}
CALLS = 25


@pytest.fixture
def marked(add: Op[...], backend: Callable[..., Backend]) -> Op[...]:
    """`add` with four backends, each of which fills the output with a number of its own."""
    for name, mark in NAMES.items():
        backend(name, priority=-1).implements(add)(adapter(mark))
    return add


MODES = [
    "eager",
    "compiled",
    pytest.param("reduce-overhead", marks=pytest.mark.gpu),
]


def function_of(op: Op[...], mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    def call(total: Tensor, x: Tensor) -> Tensor:
        return op(total.clone(), x)  # a mutated input would keep CUDA graphs away

    if mode == "eager":
        return call
    options: dict[str, Any] = {"mode": mode} if mode == "reduce-overhead" else {"backend": "aot_eager"}
    return torch.compile(call, fullgraph=True, **options)


def ran_on(call: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Make one call and return the mark of the backend that it ran on."""
    return float(call(torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))[0])


def graph_trees_here() -> None:
    """Give this thread CUDA graph trees: torch has them in the thread that imports them and in those of its own."""
    from torch._inductor import cudagraph_trees as trees

    if not hasattr(trees.local, "tree_manager_containers"):
        trees.local.tree_manager_containers = {}
        trees.local.tree_manager_locks = defaultdict(threading.Lock)


@pytest.mark.usefixtures("fresh_dynamo", "no_grad")
@pytest.mark.parametrize("mode", MODES)
def test_four_threads_each_have_their_own_backend(marked: Op[...], mode: str) -> None:
    call = function_of(marked, mode)
    assert ran_on(call) == 1.0  # compiled here, once
    wrong: list[tuple[str, float]] = []
    counted = []
    barrier = threading.Barrier(len(NAMES), timeout=120)
    # No thread may wait for the device while another one records, so there calls take turns.
    turn = threading.Lock() if mode == "reduce-overhead" else nullcontext()

    def work(name: str) -> None:
        graph_trees_here()
        barrier.wait()
        with torch.no_grad():
            for _ in range(CALLS):
                with use_backend(name), turn:
                    found = ran_on(call)
                counted.append(name)
                if found != NAMES[name]:
                    wrong.append((name, found))
                with turn:
                    outside = ran_on(call)
                if outside != 1.0:
                    wrong.append(("outside", outside))

    with ThreadPoolExecutor(len(NAMES)) as pool:
        list(pool.map(work, NAMES))
    assert len(counted) == len(NAMES) * CALLS
    assert wrong == []
    assert ran_on(call) == 1.0


@pytest.mark.usefixtures("fresh_dynamo", "no_grad")
@pytest.mark.parametrize("mode", MODES)
def test_four_tasks_each_have_their_own_backend(marked: Op[...], mode: str) -> None:
    """A recording under interleaved tasks is refused, for its replays could not tell them apart; nothing else is."""
    call = function_of(marked, mode)
    for _ in range(3):
        assert ran_on(call) == 1.0
    seen: list[tuple[str, float]] = []
    refused = []

    def attempt() -> float | None:
        try:
            return ran_on(call)
        except RegistryError as error:
            refused.append(str(error))
            return None

    async def work(name: str) -> None:
        for _ in range(CALLS if mode != "reduce-overhead" else 1):
            with use_backend(name):
                await asyncio.sleep(0)
                seen.append((name, attempt()))
                await asyncio.sleep(0)

    async def bystander() -> None:
        """A task that selects nothing, between those that do."""
        for _ in range(CALLS if mode != "reduce-overhead" else 2):
            seen.append(("none", attempt()))
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*map(work, NAMES), bystander())

    asyncio.run(main())
    assert len(seen) == (5 * CALLS if mode != "reduce-overhead" else 6)
    marks = {**NAMES, "none": 1.0}
    assert [(name, found) for name, found in seen if found not in (None, marks[name])] == []
    assert mode == "reduce-overhead" or not refused
    assert all("whose asyncio tasks select backends" in sentence for sentence in refused)
    assert ran_on(call) == 1.0


def test_a_thread_inherits_only_through_its_context(marked: Op[...]) -> None:
    found = {}

    def note(how: str) -> None:
        with torch.no_grad():
            found[how] = ran_on(marked)

    with use_backend("two"):
        threads = [
            threading.Thread(target=note, args=["plain"]),
            threading.Thread(target=contextvars.copy_context().run, args=[note, "copied"]),
        ]
        for thread in threads:
            thread.start()
            thread.join()
    assert found == {"plain": 1.0, "copied": NAMES["two"]}


class _Config:
    """What `configure` takes: a request for one backend."""

    def __init__(self, name: str) -> None:
        self.name = name

    def request(self, by: str) -> Any:
        from mamba_ops.registry.request import make

        return make(by, [self.name])


def test_configure_is_process_wide(marked: Op[...]) -> None:
    try:
        configure(_Config("three"))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(ran_on, marked).result() == NAMES["three"]
        with use_backend("one"):
            assert ran_on(marked) == NAMES["one"]
    finally:
        configure(None)
    assert ran_on(marked) == 1.0


@pytest.mark.usefixtures("fresh_dynamo", "no_grad")
def test_a_token_of_another_thread_names_the_selection(marked: Op[...]) -> None:
    """As in a backward pass, which runs in a thread of its own with what the forward one saved."""
    saved: list[Tensor] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            saved.extend(a for a in args if isinstance(a, Tensor) and a.numel() == 0)
            return gm(*args)

        return run

    compiled = torch.compile(lambda total, x: marked(total, x), fullgraph=True, backend=keep)
    with use_backend("four"):
        assert ran_on(compiled) == NAMES["four"]
    [token] = saved
    out = torch.empty(3, device=DEVICE)

    def backward() -> float:
        with torch.no_grad():
            tensors = (torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))
            for _ in range(2):
                marked.overload(*tensors, bias=None, scale=1.0, output=out, selection=token)
        return float(out[0])

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backward).result() == NAMES["four"]
    with use_backend("one"):  # what a context asks for stands above it
        assert backward() == NAMES["one"]


def test_no_jit_is_a_contexts_own() -> None:
    with no_jit():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(announce, "kernel", "cause").result()
        with pytest.raises(errors.CompilationError, match=r"no_jit\(\) is active"):
            announce("kernel", "cause")


def test_a_swap_back_finds_its_decisions(marked: Op[...]) -> None:
    """Neither validation nor a refusal is asked again."""
    asked = []
    marked.validate(lambda x: asked.append(x.shape))
    for _ in range(3):
        ran_on(marked)
        with use_backend("one"):
            ran_on(marked)
            with use_backend("two"):
                ran_on(marked)
    assert len(asked) == 3


def test_entering_and_leaving_a_block_costs_at_most_three_calls(marked: Op[...]) -> None:
    """Of the boundary: of an op whose kernel does nothing, called with the output given."""
    marked.kernels["one"].__dict__["function"] = lambda *args, **kwargs: None
    total, x, out = (torch.zeros(3) for _ in range(3))

    def calls(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            marked(total, x, out=out)
        return (time.perf_counter() - begin) / n

    def swaps(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            with use_backend("one"):
                marked(total, x, out=out)
        return (time.perf_counter() - begin) / n

    with torch.no_grad():
        with use_backend("one"):
            calls(50)
        swaps(50)
        rounds = []
        for _ in range(15):
            with use_backend("one"):
                call = calls(100)
            rounds.append((call, swaps(100)))
    call, with_block = (min(times) for times in zip(*rounds, strict=True))  # others are on the machine too
    assert with_block - call <= 3 * call


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forks_while_another_thread_swaps(marked: Op[...]) -> None:
    """A child has the lock free, and the selection of the context that forked."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            with use_backend("three"):
                pass

    thread = threading.Thread(target=churn)
    thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for name in NAMES:
            receiver, sender = context.Pipe(duplex=False)
            with use_backend(name):
                child = context.Process(target=lambda s=sender: s.send(explain(marked, *_tensors()).backend))
                child.start()
            assert receiver.poll(60), "the child hangs"
            assert receiver.recv() == name
            child.join(60)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join()


def _tensors() -> tuple[Tensor, Tensor]:
    return torch.zeros(3), torch.ones(3)


def instances() -> Iterator[errors.RegistryError]:
    """One of each class of errors."""
    made = {
        errors.NoBackendError: lambda: errors.NoBackendError("a sentence", {"torch": "why not"}),
        errors.ConfigError: lambda: errors.ConfigError(["one", "two"]),
    }
    for cls in vars(errors).values():
        if isinstance(cls, type) and issubclass(cls, errors.RegistryError):
            yield made.get(cls, lambda cls=cls: cls("a sentence"))()


@pytest.mark.parametrize("error", list(instances()), ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: errors.RegistryError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))
    assert str(type(error)(str(error))) == str(error)  # as a DataLoader makes a worker's error again


def test_there_is_an_error_of_each_class() -> None:
    assert len(list(instances())) == 7


def test_settings_of_a_third_partys_backend(backend: Callable[..., Backend], add: Op[...]) -> None:
    """From code and from the string."""
    foo = backend("foo", settings={"tile": ("a", "b")}, priority=-1)
    foo.implements(add)(adapter(5))
    assert foo.settings == {"tile": "a"}
    for config in (BackendConfig("foo", foo_tile="b"), BackendConfig.from_string("foo,foo_tile=B")):
        assert config.foo_tile == "b"
        assert str(config) == "foo,foo_tile=b"
        with use_backend(config):
            assert foo.settings == {"tile": "b"}
            assert ran_on_cpu(add) == 5.0
        assert foo.settings == {"tile": "a"}
    assert BackendConfig("foo").foo_tile == "a"
    for wrong, says in (
        ({"foo_tile": "c"}, "foo_tile: got 'c', expected a, b"),
        ({"foo_tiles": "a"}, "unknown setting 'foo_tiles'; valid: .*did you mean foo_tile"),
    ):
        with pytest.raises(errors.ConfigError, match=says):
            BackendConfig("foo", **wrong)
    with pytest.raises(errors.ConfigError, match="foo_tile: got 'c', expected a, b"):
        BackendConfig.from_string("foo_tile=c")


def test_settings_of_a_third_partys_backend_from_the_environment(backend: Callable[..., Backend], add: Op[...]) -> None:
    foo = backend("foo", settings={"tile": ("a", "b")}, priority=-1)
    foo.implements(add)(adapter(5))
    with environment(TOYS_BACKEND="foo,foo_tile=b"):
        assert ran_on_cpu(add) == 5.0
        assert foo.settings == {"tile": "b"}


def ran_on_cpu(op: Op[...]) -> float:
    with torch.no_grad():
        return float(op(*_tensors())[0])
