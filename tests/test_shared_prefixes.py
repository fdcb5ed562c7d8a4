"""An engine's flow with every kind of layer: prefixes, branches, rejected drafts, evictions, swaps, faults.

Every request gets what it gets alone, token for token, and no slot is lost.
"""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mamba_ops
from benchmarks import prefixes
from examples.shared_prefixes import Engine, Model, Request, is_as_alone
from mamba_ops.registry import Backend, use_backend
from mamba_ops.serving import NoFreeSlot, PiecewiseRunner, Plan, PrefixCache, StatePool
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
LETTERS = 4  # so few that random guesses are often right, and random prompts often begin alike


class Fault(Exception):
    """Of a device, say."""


class FewLetters(Model):
    """A model that fails in the middle of its layers when it is told to."""

    fails = False

    def forward(self, tokens: Tensor, plan: Plan | None = None) -> Tensor:
        return super().forward(tokens, plan)[:, :LETTERS]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # the references are exact in float64
        yield


@pytest.fixture
def borrowed() -> Iterator[str]:
    """A second backend, with the kernels of the first."""
    backend = Backend("borrowed", devices=None, priority=-1)
    for op in (
        mamba_ops.selective_state_update,
        mamba_ops.mamba_chunk_scan,
        mamba_ops.causal_conv1d,
        mamba_ops.chunk_kda,
    ):
        backend.implements(op)(op.kernels["torch"].function)
    yield backend.name
    backend.remove()


def new_model(seed: int = 0) -> FewLetters:
    torch.manual_seed(seed)
    model = FewLetters(hidden=16).to(DEVICE, torch.float64)

    def fail(*_: Any) -> None:
        if model.fails:
            raise Fault

    model.layers["gdn"].register_forward_pre_hook(fail)
    return model


class Slots:
    """Who has which slot of an engine's pool; what nobody has is NaN."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.clean = engine, set(range(engine.pool.slots))
        self._fill(self.clean)

    def check(self) -> None:
        engine, pool = self.engine, self.engine.pool
        owned = Counter([slot for r in engine.running for slot in r.slots] + [*engine.prefixes.slots])
        assert max(owned.values(), default=1) == 1
        assert owned.keys() == pool.allocated
        assert not any(request.slots for request in engine.waiting)
        free = set(range(pool.slots)) - pool.allocated
        self._fill(free - self.clean)
        self.clean = free

    def _fill(self, slots: set[int]) -> None:
        if slots:
            for caches in self.engine.pool.caches.values():
                for cache in caches:
                    cache[list(slots)] = torch.nan


def run_at_random(steps: int, seed: int, borrowed: str) -> Counter[str]:
    """Run an engine for so many steps, with everything that may happen; return what did."""
    rng, model = random.Random(seed), new_model(seed)

    def draft(request: Request, most: int) -> list[int]:
        return [rng.randrange(LETTERS) for _ in range(rng.randint(0, max(most, 0)))]

    engine = Engine(model, slots=33, most_running=5, budget=48, block_size=8, drafts=3, rounds=4, draft=draft)
    slots, prompts, done = Slots(engine), list[list[int]](), Counter[str]()
    unchecked: list[tuple[Request, int]] = []
    while engine.steps + done["faults"] < steps:
        if rng.random() < 0.3 and len(engine.waiting) < 4:
            shared = rng.choice(prompts) if prompts and rng.random() < 0.7 else []
            begin = shared[: rng.randint(0, len(shared))]
            prompts.append([*begin, *(rng.randrange(LETTERS) for _ in range(rng.randint(1, 60 - len(begin) // 2)))])
            prompts[:] = prompts[-6:]
            unchecked.append((Request(list(prompts[-1]), rng.randint(1, 16)), len(prompts[-1])))
            engine.add(unchecked[-1][0])
        if engine.running and rng.random() < 0.05:
            branch = engine.branch(rng.choice(engine.running), rng.randrange(LETTERS), rng.randint(1, 8))
            if branch is not None:
                done["branches"] += 1
                unchecked.append((branch, len(branch.tokens)))
        if engine.running and rng.random() < 0.05:
            engine.take_slots(rng.choice(engine.running))
            done["swapped out"] += 1
        if rng.random() < 0.05:
            done["evicted"] += engine.prefixes.evict()
        model.fails = rng.random() < 0.03
        backend = "torch" if rng.random() < 0.7 else f"{borrowed}:torch"
        done["swaps of the backend"] += backend != "torch"
        try:
            with use_backend(backend):
                engine.step()
        except Fault:
            done["faults"] += 1
        model.fails = False
        slots.check()
        for request, prompt in [pair for pair in unchecked if pair[0].done]:
            unchecked.remove((request, prompt))
            assert len(request.tokens) == request.end
            assert is_as_alone(model, request, prompt)
            done["requests"] += 1
            done["tokens found"] += request.found
    while engine.running:
        engine.take_slots(engine.running[0])
    while engine.prefixes.evict():
        pass
    assert engine.pool.num_free == 33
    return done + Counter({"guessed": engine.guessed, "kept": engine.kept, "steps": engine.steps})


def require_all(done: Counter[str], steps: int) -> None:
    for what, share in {
        "requests": 0.15, "tokens found": 1, "branches": 0.005, "swapped out": 0.02, "evicted": 0.01, "faults": 0.01,
        "swaps of the backend": 0.2, "guessed": 1, "kept": 0.2,
    }.items():  # fmt: skip
        assert done[what] >= share * steps, (what, done)
    assert done["kept"] < done["guessed"] / 2


def test_every_request_is_as_alone_whatever_happens(borrowed: str) -> None:
    require_all(run_at_random(150, 0, borrowed), 150)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_thousand_steps(borrowed: str) -> None:
    total = Counter[str]()
    for seed in range(1, 5):
        total += run_at_random(2500, seed, borrowed)
    require_all(total, 10_000)


def test_what_is_known_is_not_read_again() -> None:
    """The second request reads four tokens, and nothing is copied; the state that both go on from stays as it is."""
    model = new_model()
    engine = Engine(model, slots=24, block_size=16)
    text = [random.Random(0).randrange(LETTERS) for _ in range(100)]
    for more, read in (([], 100), ([], 4), ([1, 2], 6), ([3] * 20, 24)):
        before, known = engine.read, {slot: states_of(engine, slot) for slot in engine.prefixes.slots}
        request = Request([*text, *more], 1)
        engine.add(request)
        while not request.done:
            engine.step()
        assert engine.read - before == read
        assert is_as_alone(model, request, len(text) + len(more))
        for slot, states in known.items():
            assert all(map(torch.equal, states, states_of(engine, slot)))
    assert len(engine.prefixes) == 4  # the last three blocks of a prompt that is read in four pieces, and the longest


def states_of(engine: Engine, slot: int) -> list[Tensor]:
    return [cache[slot].clone() for caches in engine.pool.caches.values() for cache in caches]


def test_all_of_it_is_one_graph() -> None:
    """Prefixes, pieces of prompts, drafts and plain steps; and one graph more for a single token."""
    model = new_model()
    options: dict[str, Any] = {"columns": 4, "speculative": True, "shared": True, "rounds": 4, "device": DEVICE}
    runner = PiecewiseRunner(
        model, max_tokens=48, max_requests=20, capture_sizes=(8, 48), compile_piece="eager", **options
    )
    rng = random.Random(1)
    engine = Engine(
        model,
        slots=30,
        most_running=5,
        budget=48,
        block_size=8,
        draft=lambda _, most: [rng.randrange(LETTERS) for _ in range(most)],
        run=runner,
    )
    text = [rng.randrange(LETTERS) for _ in range(40)]
    work = [Request([*text[: rng.randint(1, 40)], rng.randrange(LETTERS)], 6) for _ in range(6)]
    prompts = [len(request.tokens) for request in work]
    for request in work:
        engine.add(request)
    while engine.running or engine.waiting:
        engine.step()
    assert all(is_as_alone(model, r, prompt) for r, prompt in zip(work, prompts, strict=True))
    assert engine.kept > 0
    assert sum(r.found for r in work) > 0
    assert len(runner.backend.graphs) == 1
    plan = Plan.of([0], [4], [[0]], max_requests=20, device=DEVICE)
    with pytest.raises(ValueError, match="see columns, speculative, shared and rounds"):
        runner(plan, torch.zeros(4, dtype=torch.int64, device=DEVICE))


class TestPrefixCache:
    def test_the_longest_known_beginning_is_found(self) -> None:
        cache = PrefixCache(StatePool({}, 8), 4)
        text = list(range(12))
        kept = cache.keep(text, 0, 9, most=3)
        assert kept.keys() == {4, 8}
        assert cache.find(text) == (0, None)  # not before the step has run
        cache.commit()
        assert cache.find(text) == (8, kept[8])
        assert cache.find(text[:8]) == (4, kept[4])  # one token is left to read
        assert cache.find(text[:7]) == (4, kept[4])
        assert cache.find([*text[:4], 99, *text[5:]]) == (4, kept[4])
        assert cache.find(text[1:]) == (0, None)
        assert cache.keep(text, 0, 12, most=3).keys() == {12}

    def test_no_more_than_asked_for_and_the_last_ones(self) -> None:
        cache = PrefixCache(StatePool({}, 8), 2)
        assert cache.keep(list(range(9)), 1, 9, most=2).keys() == {6, 8}
        assert cache.keep(list(range(9)), 1, 9, most=0) == {}

    def test_a_failed_step_keeps_nothing(self) -> None:
        cache = PrefixCache(StatePool({}, 3), 2)
        assert cache.keep([1, 2, 3], 0, 3, most=1)
        cache.discard()
        assert cache.pool.num_free == 3
        assert cache.find([1, 2, 3]) == (0, None)

    def test_the_least_used_goes_first_and_nothing_that_a_step_reads(self) -> None:
        cache = PrefixCache(StatePool({}, 2), 1)
        for token in (1, 2):
            cache.keep([token, 0], 0, 1, most=1)
            cache.commit()
        cache.find([1, 0])
        slot = cache.allocate()  # that of 2: 1 was used since, and is read
        assert cache.find([2, 0]) == (0, None)
        assert not cache.evict()
        with pytest.raises(NoFreeSlot):
            cache.allocate()
        cache.commit()
        assert cache.evict()
        cache.pool.free(slot)
        assert cache.pool.num_free == 2
        assert len(cache) == 0

    def test_two_requests_of_a_step_keep_a_state_once(self) -> None:
        cache = PrefixCache(StatePool({}, 4), 2)
        assert len(cache.keep([1, 2, 3], 0, 3, most=1)) == 1
        assert cache.keep([1, 2, 4], 0, 3, most=1) == {}

    @pytest.mark.parametrize("size", [0, -1, True, 2.0, None])
    def test_a_block_is_a_whole_number_of_tokens(self, size: Any) -> None:
        with pytest.raises(ValueError, match=r"^PrefixCache: block_size: got .*, expected a whole number, 1 at least"):
            PrefixCache(StatePool({}, 4), size)

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
    def test_tokens_are_the_same_whatever_holds_them(self, kind: Any) -> None:
        cache = PrefixCache(StatePool({}, 4), 2)
        kept = cache.keep([1, 2, 3, 4], 0, 4, most=1)
        cache.commit()
        assert cache.find(kind([1, 2, 3, 4, 5])) == (4, kept[4])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stop": 5}, "stop: got 5, expected 0 to the 4 tokens"),
            ({"computed": -1}, "computed: got -1, expected 0 to the 4 tokens"),
            ({"computed": None}, "computed: got None, expected 0 to the 4 tokens"),
            ({"most": -1}, "most: got -1, expected 0 or more"),
            ({"tokens": [1.0, 2.0, 3.0, 4.0]}, r"tokens: got \[1.0, 2.0, 3.0, 4.0\], expected whole numbers"),
        ],
    )
    def test_what_it_is_asked_wrongly_takes_no_slot(self, change: dict[str, Any], message: str) -> None:
        pool = StatePool({}, 4)
        cache = PrefixCache(pool, 2)
        with pytest.raises(ValueError, match=f"^PrefixCache: {message}"):
            cache.keep(**({"tokens": [1, 2, 3, 4], "computed": 0, "stop": 4, "most": 2} | change))
        assert pool.num_free == 4
        assert not cache.slots


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba3", "GatedDeltaNet", "KimiDeltaAttention", "ShortConv"])
def test_the_benchmark_reads_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of reading runs, and the times are in the order of its columns."""
    clock = iter(range(100))

    def once(call: Any, device: torch.device) -> float:
        call()
        return next(clock)

    monkeypatch.setattr(prefixes, "microseconds", once)
    layer = prefixes.layers_of(32, 16)[name]
    assert prefixes.times_of(layer, 24, 8, DEVICE, torch.float32) == [*range(len(prefixes.ROUNDS) + 3)]
