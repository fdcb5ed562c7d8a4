"""The engine of examples/continuous_batching.py: whatever happens to it, every request gets what it gets alone."""

import gc
import inspect
import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from examples.continuous_batching import Engine, Hybrid, Request, alone
from mamba_ops.registry import Backend, use_backend
from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR
from tests.tape import Tape

DEVICE = ACCELERATOR or torch.device("cpu")
LENGTH, SLOTS, BUDGET = 24, 5, 12

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_exact")


@pytest.fixture
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):
        yield


@pytest.fixture
def model() -> Hybrid:
    torch.manual_seed(0)
    sizes = {"hidden": 16, "pairs": 2, "heads": 2, "head_dim": 8, "dstate": 4}
    return Hybrid(**sizes, length=LENGTH).requires_grad_(False).double().to(DEVICE)


def engine_of(model: Hybrid, **options: Any) -> Engine:
    graphs = Tape() if ACCELERATOR is None else None  # a stand-in on a CPU
    options = {"capture_sizes": (1, 2, 4, 8), "compile_piece": "eager", "graphs": graphs, **options}
    engine = Engine(model, slots=SLOTS, budget=BUDGET, **options)
    for cache in caches_of(engine):
        cache.fill_(torch.nan)  # what a request reads before it was written shows
    return engine


def caches_of(engine: Engine) -> list[Tensor]:
    return [cache for caches in engine.pool.caches.values() for cache in caches]


def new_request(rng: random.Random) -> Request:
    return Request([rng.randrange(256) for _ in range(rng.randint(1, 15))], rng.randint(1, 8))


def finish(engine: Engine, steps: int = 500) -> None:
    while engine.running or engine.waiting:
        engine.step()
        steps -= 1
        assert steps, "requests are stuck"
    assert engine.pool.num_free == SLOTS


def expect(model: Hybrid, requests: list[Request]) -> None:
    for request in requests:
        own = alone(model, request)
        assert request.output == own.output
        torch.testing.assert_close(torch.stack(request.logits), torch.stack(own.logits))


class Flaw(Exception):
    pass


class Flaky:
    """A backend that runs the references, and raises in the call that it is told to."""

    def __init__(self) -> None:
        self.backend = Backend("flaky", devices=None, priority=-10)
        self.fail_in = -1
        for op in (mamba_ops.selective_state_update, mamba_ops.mamba_chunk_scan):
            self.backend.implements(op)(self._borrow(op.kernels["torch"].function))

    def _borrow(self, kernel: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            self.fail_in -= 1
            if self.fail_in == -1:
                raise Flaw
            kernel(*args, **kwargs)

        run.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
        return run

    def arm(self, calls: int) -> None:
        self.fail_in = calls


@pytest.fixture
def flaky() -> Iterator[Flaky]:
    made = Flaky()
    yield made
    made.backend.remove()


def test_more_requests_than_slots_wait(model: Hybrid) -> None:
    rng = random.Random(0)
    requests = [new_request(rng) for _ in range(2 * SLOTS)]
    engine = engine_of(model)
    for request in requests:
        engine.add(request, LENGTH)
    engine.step()
    assert (len(engine.running), len(engine.waiting), engine.pool.num_free) == (SLOTS, SLOTS, 0)
    assert sorted(r.slot for r in engine.running) == sorted(engine.pool.allocated)
    finish(engine)
    expect(model, requests)


@pytest.mark.gpu
def test_what_inductor_compiles_for_a_gpu_is_right_too(model: Hybrid) -> None:
    """All of the model, also what it makes of the plan between the ops; the CPU's compiler lowers other code."""
    rng, engine = random.Random(3), engine_of(model, compile_piece="inductor")
    requests = [new_request(rng) for _ in range(2 * SLOTS)]
    for request in requests:
        engine.add(request, LENGTH)
    finish(engine)
    expect(model, requests)


def test_a_slot_is_used_again_with_anything_in_it(model: Hybrid) -> None:
    """Also NaN, all over the pages: as the request before left it, or worse."""
    rng, engine = random.Random(1), engine_of(model)
    for _ in range(3):
        requests = [new_request(rng) for _ in range(SLOTS)]
        for request in requests:
            engine.add(request, LENGTH)
        finish(engine)
        expect(model, requests)
        for cache in caches_of(engine):
            cache.fill_(torch.nan)


def test_steps_without_requests(model: Hybrid) -> None:
    engine = engine_of(model)
    for _ in range(3):
        engine.step()
    assert all(cache[1:].isnan().all() for cache in caches_of(engine))  # slot 0 is the null slot
    assert (engine.steps, engine.mixed) == (3, 0)


@pytest.mark.parametrize("prompt", [[], [1] * LENGTH])
def test_a_request_that_does_not_fit_is_refused(model: Hybrid, prompt: list[int]) -> None:
    engine = engine_of(model)
    with pytest.raises(ValueError, match=r"Engine.add: got a prompt of \d+ tokens and 2 new ones, expected"):
        engine.add(Request(prompt, 2), LENGTH)
    assert not engine.waiting


@pytest.mark.parametrize("when", [0, 2, 5])
def test_an_exception_in_the_middle_of_a_step(model: Hybrid, flaky: Flaky, when: int) -> None:
    """In the second layer, some caches are a step ahead of others: those requests begin again, others go on."""
    rng = random.Random(2)
    requests = [new_request(rng) for _ in range(SLOTS)]
    engine = engine_of(model)
    with use_backend("flaky"):
        for request in requests:
            engine.add(request, LENGTH)
        for _ in range(when):
            engine.step()
        reading = engine.running[: SLOTS - 1]
        left_out = [r for r in engine.running if r not in reading]
        others = [cache[[r.slot for r in left_out]].clone() for cache in caches_of(engine)]
        for request in left_out:
            engine.running.remove(request)
        flaky.arm(1)
        with pytest.raises(Flaw):
            finish(engine)
        engine.running += left_out
        assert all(request.computed == 0 for request in reading if not request.done)
        for cache, before in zip(caches_of(engine), others, strict=True):
            torch.testing.assert_close(cache[[r.slot for r in left_out]], before, rtol=0, atol=0, equal_nan=True)
        finish(engine)
    expect(model, requests)


class Watched:
    """A runner; after every step, also one that fails, nothing has changed but the slots of its plan."""

    def __init__(self, engine: Engine) -> None:
        self.inner, self.caches = engine.runner, caches_of(engine)

    def __call__(self, plan: Plan, *inputs: Tensor) -> Tensor:
        slots = plan.tensors.slots
        assert slots is not None
        others = sorted(set(range(1, SLOTS + 1)) - set(slots.flatten().tolist()))
        before = [cache[others].clone() for cache in self.caches]
        try:
            return self.inner(plan, *inputs)
        finally:
            for cache, old in zip(self.caches, before, strict=True):
                torch.testing.assert_close(cache[others], old, rtol=0, atol=0, equal_nan=True)


def do_something_wrong(engine: Engine, rng: random.Random) -> None:
    """Be refused, and have changed nothing."""
    before = [cache.clone() for cache in caches_of(engine)]
    taken, running = engine.pool.allocated, list(engine.running)
    options: dict[str, Any] = {"max_requests": SLOTS, "null_slot": 0, "device": DEVICE}
    one = torch.zeros(1, dtype=torch.int64)
    wrong = [
        lambda: engine.add(Request([1] * LENGTH, 1), LENGTH),
        lambda: engine.pool.free(0),
        lambda: engine.runner(Plan.of([0], [2], [1], **options), one),
        lambda: engine.runner(Plan.of([0], [BUDGET + 1], [1], **options), torch.zeros(BUDGET + 1, dtype=torch.int64)),
        lambda: engine.runner(Plan.of([0], [1], [1], max_requests=SLOTS + 1, null_slot=0), one),
        lambda: engine.runner(Plan.of([1, 1], [1, 1], [2, 2], **options), one),
    ]
    with pytest.raises(ValueError, match=r"^(Engine\.add|StatePool|PiecewiseRunner|Plan): "):
        rng.choice(wrong)()
    torch.testing.assert_close(caches_of(engine), before, rtol=0, atol=0, equal_nan=True)
    assert (engine.pool.allocated, engine.running) == (taken, running)


def run_random_steps(model: Hybrid, flaky: Flaky, steps: int) -> None:
    """Arrivals, finishes, swaps and faults; tokens are compared, caches watched, slots and tensors counted."""
    rng, engine, swaps = random.Random(0), engine_of(model), ExitStack()
    swaps.enter_context(use_backend("flaky"))
    runner = engine.runner
    engine.runner = Watched(engine)  # type: ignore[assignment]
    requests: list[Request] = []
    served, faults, tensors = 0, 0, []
    for step in range(steps):
        if rng.random() < 0.3 and len(engine.waiting) < 4:
            requests.append(new_request(rng))
            engine.add(requests[-1], LENGTH)
        if rng.random() < 0.02:  # enough steps in between to record and to replay
            swaps.close()
            swaps.enter_context(use_backend(rng.choice(("torch", "flaky"))))
        if rng.random() < 0.02:
            do_something_wrong(engine, rng)
        flaky.arm(rng.randrange(3) if rng.random() < 0.1 else -1)
        try:
            engine.step()
        except Flaw:
            faults += 1
        flaky.arm(-1)
        assert sorted(r.slot for r in engine.running) == sorted(engine.pool.allocated)
        done = [r for r in requests if r.done]
        expect(model, done)
        served += len(done)
        requests = [r for r in requests if not r.done]
        if step in (steps // 2, steps - 1):
            gc.collect()
            tensors.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    finish(engine)
    swaps.close()
    expect(model, requests)
    assert served > steps // 20
    assert faults > steps // 300
    assert engine.mixed > steps // 10
    assert min(runner.steps["full"], runner.steps["piecewise"]) > steps // 10
    assert runner.recorded > steps // 50
    assert tensors[1] < 1.5 * tensors[0] + 500


def test_random_steps(model: Hybrid, flaky: Flaky) -> None:
    run_random_steps(model, flaky, 60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_random_steps(model: Hybrid, flaky: Flaky) -> None:
    run_random_steps(model, flaky, 10_000)
