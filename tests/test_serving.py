"""The piecewise runner: on every step the eager model's numbers, however the step ran; and what it refuses.

On a CPU, graphs are a stand-in (tests/tape.py); with a GPU these are the device's own.
"""

import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import mamba_ops
from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2
from mamba_ops.registry import Backend, mark_splitting, use_backend
from mamba_ops.serving import PiecewiseRunner, Plan, StatePool
from tests.conftest import ACCELERATOR
from tests.tape import Tape

DEVICE = ACCELERATOR or torch.device("cpu")
SLOTS, MAX_TOKENS, SIZES = 6, 24, (1, 2, 4, 8, 16)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_exact")


@pytest.fixture
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):
        yield


class Model(nn.Module):
    """Numbers in, numbers out, in float64: a layer of each kind."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [
            Mamba2(16, heads=4, head_dim=8, dstate=8, chunk_size=8),
            GatedDeltaNet(16, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
            Mamba(16, d_inner=24, dstate=8, dt_rank=3),
        ][:depth]
        self.layers = nn.ModuleList(layers).double().to(DEVICE)
        self.pool = StatePool.of({str(i): layer for i, layer in enumerate(layers)}, SLOTS, state_dtype=torch.float64)

    def forward(self, hidden: Tensor, plan: Plan) -> Tensor:
        for i, layer in enumerate(self.layers):
            hidden = hidden + layer(hidden.sin(), *self.pool.caches[str(i)], plan=plan)
        return hidden.cos()

    @property
    def states(self) -> list[Tensor]:
        return [cache for caches in self.pool.caches.values() for cache in caches]


@pytest.fixture
def model() -> Model:
    return Model()


def graphs(*, record: bool = True) -> Any:
    """A tape on a CPU; None, the device's own graphs, with a GPU."""
    return Tape() if record and ACCELERATOR is None else None


def runner_of(model: Callable[..., Tensor], **options: Any) -> PiecewiseRunner:
    given = {"max_tokens": MAX_TOKENS, "max_requests": SLOTS, "capture_sizes": SIZES, "device": DEVICE}
    return PiecewiseRunner(model, **{**given, "compile_piece": "eager", "graphs": graphs(), **options})


def plan_of(computed: list[int], new: list[int], slots: Any, **options: Any) -> Plan:
    return Plan.of(computed, new, slots, **{"max_requests": SLOTS, "device": DEVICE, **options})


def changed_plan(name: str, change: Callable[[Tensor], Tensor]) -> Plan:
    """A right plan of two tokens with another tensor in it."""
    plan = plan_of([0], [2], [0])
    return Plan(plan.tensors._replace(**{name: change(getattr(plan.tensors, name))}), plan.tokens)


def as_eager(runner: PiecewiseRunner, model: Model, plan: Plan) -> None:
    """Run a step both ways, from the same caches."""
    hidden = torch.randn(plan.tokens, 16, device=DEVICE, dtype=torch.float64)
    before = [state.clone() for state in model.states]
    got = runner(plan, hidden).clone()
    after = [state.clone() for state in model.states]
    for state, old in zip(model.states, before, strict=True):
        state.copy_(old)
    expected = model(hidden, plan)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(after, model.states)


def random_steps(count: int, *, seed: int = 0) -> Iterator[Plan]:
    """Steps of some requests that go on for ever: decodes alone, or beside prompts."""
    rng = random.Random(seed)
    computed = dict.fromkeys(range(SLOTS), 0)
    for _ in range(count):
        slots = rng.sample(range(SLOTS), rng.randint(0, SLOTS))
        decodes = rng.random() < 0.5
        new = [1 if decodes and computed[s] else rng.randint(1, 4) for s in slots]
        yield plan_of([computed[s] for s in slots], new, slots)
        computed.update({s: computed[s] + n for s, n in zip(slots, new, strict=True)})


@pytest.mark.parametrize("recorded", [True, False])
def test_every_step_is_as_in_the_eager_model(model: Model, recorded: bool) -> None:
    runner = runner_of(model, graphs=graphs(record=recorded))
    for plan in random_steps(60):
        as_eager(runner, model, plan)
    assert runner.steps.total() == 60
    assert min(runner.steps["full"], runner.steps["piecewise"]) > 20
    assert runner.recorded > 10 if recorded else runner.recorded == 0 or ACCELERATOR
    assert [len(graph) for graph in runner.backend.graphs] == [2 * 3 + 1] * len(runner.backend.graphs)
    assert len(runner.backend.graphs) == counters["stats"]["unique_graphs"] == 2  # one for a single token


def test_what_inductor_compiles_is_as_in_the_eager_model() -> None:
    model = Model(depth=1)
    runner = runner_of(model, compile_piece="inductor", graphs=None)
    for plan in random_steps(8):
        as_eager(runner, model, plan)


def test_replays_launch_nothing_from_python(model: Model) -> None:
    runner = runner_of(model)
    runner.prepare(torch.zeros(1, 16, dtype=torch.float64))
    recorded = runner.recorded
    assert recorded == len([1, 2, 4]) + (3 + 1) * len(SIZES)  # full steps, and of the others each piece
    decodes, mixed = plan_of([3, 3, 3], [1, 1, 1], [0, 1, 2]), plan_of([3, 0, 3], [1, 4, 1], [0, 1, 2])
    with mamba_ops.record_selections() as record:
        as_eager(runner, model, decodes)
        eager = len(record)  # the eager model's own; record_selections forgets decisions, it raises no generation
        record.clear()
        runner(decodes, torch.zeros(3, 16, device=DEVICE, dtype=torch.float64))
        assert record == []
        runner(mixed, torch.zeros(6, 16, device=DEVICE, dtype=torch.float64))
        assert {op for op, _ in record} >= {"mamba_ops::mamba2_mixing", "mamba_ops::selective_state_update"}
    assert eager > 0
    assert runner.recorded == recorded


@pytest.fixture
def doubled() -> Iterator[Backend]:
    """A backend whose decode says twice as much as the reference."""
    backend = Backend("doubled", devices=None, priority=-10)
    op = mamba_ops.selective_state_update
    kernel = op.kernels["torch"].function

    def run(*args: Any, output: Tensor, **kwargs: Any) -> None:
        kernel(*args, output=output, **kwargs)
        output.mul_(2)

    run.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    backend.implements(op)(run)
    yield backend
    backend.remove()


@pytest.mark.parametrize("new", [[1, 1, 1], [1, 3, 1]], ids=["full", "piecewise"])
def test_a_swap_records_anew(model: Model, doubled: Backend, new: list[int]) -> None:
    runner, seen = runner_of(model), []
    plan = plan_of([5, 5, 5], new, [4, 0, 2])
    for backend in ("torch", "doubled", "torch"):
        with use_backend(backend):
            for _ in range(3):
                as_eager(runner, model, plan)
        seen.append(runner.recorded)
    assert seen == [seen[0], 2 * seen[0], 3 * seen[0]]
    assert len(runner.backend.graphs) == 1


class Reading(nn.Module):
    """Its pieces read the plan, and an attribute that may be another tensor one day."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.inner, self.pool, self.shift = model, model.pool, torch.zeros(16, device=DEVICE, dtype=torch.float64)

    def forward(self, hidden: Tensor, plan: Plan) -> Tensor:
        computed = plan.tensors.num_computed_tokens
        assert computed is not None
        out: Tensor = self.inner(hidden + computed.sum() + self.shift, plan) + self.shift * computed.max()
        return out

    @property
    def states(self) -> list[Tensor]:
        return self.inner.states


def test_the_callers_tensors_stay_as_they_are(model: Model) -> None:
    """Pieces read the plan where it was when they were recorded; that is the runner's place, not the first plan's."""
    reading: Any = Reading(model)
    runner = runner_of(reading)
    plans = [plan_of([c, c + 1], [1, 3], [0, 1]) for c in (3, 8, 20)]
    copies = [[None if t is None else t.clone() for t in plan.tensors] for plan in plans]
    for plan in plans * 2:
        as_eager(runner, reading, plan)
    torch.testing.assert_close([list(plan.tensors) for plan in plans], copies)
    before, reading.shift = reading.shift, torch.ones_like(reading.shift)
    recorded = runner.recorded
    for plan in plans:
        as_eager(runner, reading, plan)
    assert not before.any()
    assert runner.recorded == recorded


def test_without_full_graphs_decodes_run_piecewise(model: Model) -> None:
    runner = runner_of(model, full_graphs=False)
    runner.prepare(torch.zeros(1, 16, dtype=torch.float64))
    as_eager(runner, model, plan_of([3, 3], [1, 1], [0, 1]))
    assert (dict(runner.steps), runner.recorded) == ({"piecewise": 1}, 4 * len(SIZES))


def test_no_requests_are_a_step(model: Model) -> None:
    runner, before = runner_of(model), [state.clone() for state in model.states]
    for _ in range(3):
        assert runner(plan_of([], [], []), torch.zeros(0, 16, dtype=torch.float64)).shape == (0, 16)
    torch.testing.assert_close(model.states, before)


def test_more_tokens_than_any_size_run_without_graphs(model: Model) -> None:
    runner = runner_of(model)
    for n in (17, 24, 17, 17):
        as_eager(runner, model, plan_of([0], [n], [3]))
    assert (dict(runner.steps), runner.recorded) == ({"plain": 4}, 0)


def test_a_piece_that_reads_the_host_is_not_recorded(model: Model) -> None:
    """Its counts would be those of the first step for ever."""
    mark_splitting(mamba_ops.gdn_mixing, False)
    try:
        runner = runner_of(model)
        for _ in range(3):
            for lengths in ([4, 1, 3], [1, 4, 3], [2, 3, 3]):
                as_eager(runner, model, plan_of([0, 5, 0], lengths, [1, 2, 3]))
        [pieces] = runner.backend.graphs
        assert [len(piece.ops) for piece in pieces] == [0, 1, 0, 1, 0]
        assert runner.recorded == 2
    finally:
        mark_splitting(mamba_ops.gdn_mixing)


@pytest.mark.parametrize(
    ("plan", "tokens", "says"),
    [
        (plan_of([3], [1], [0]), 2, r"inputs: got 2 tokens, expected 1, as the plan has"),
        (plan_of([0], [25], [0]), 25, r"plan: got 25 tokens, expected at most max_tokens=24; read prompts in chunks"),
        (plan_of([0], [2], [0], max_requests=3), 2, r"plan: got a plan with max_requests=3, expected max_requests=6"),
        (plan_of([0], [2], [0], null_slot=0), 2, r"plan: got null_slot 0, expected -1, as the runner has"),
        (
            changed_plan("slots", lambda slots: slots.long() + 2**32),
            2,
            r"plan: got slots of torch.int64 on .*, expected slots of torch.int32 on .*, as Plan.of makes it",
        ),
        (
            changed_plan("cu_seqlens", lambda ends: ends.to("meta")),
            2,
            r"plan: got cu_seqlens of torch.int32 on meta, exp",
        ),
        (Plan(plan_of([0], [3], [0]).tensors, 2), 2, r"plan: got counts of 3 tokens, expected 2, as it says itself"),
        (plan_of([0], [2], [[0, 1]]), 2, r"plan: got tensors of shapes .*\(6, 2\).*; see columns, speculative"),
        (plan_of([0], [2], [0], accepted=[0]), 2, r"plan: got tensors of shapes .*, expected .*None\]; see columns"),
        (Plan(Plan.zeros(0).tensors._replace(counts=None), 2), 2, r"plan: got no plan, expected a Plan"),
    ],
)
def test_refusals_write_nothing(model: Model, plan: Plan, tokens: int, says: str) -> None:
    runner, before = runner_of(model), [state.clone() for state in model.states]
    with pytest.raises(ValueError, match=f"^PiecewiseRunner: {says}"):
        runner(plan, torch.ones(tokens, 16, dtype=torch.float64))
    torch.testing.assert_close(model.states, before)
    assert not runner.steps


def test_inputs_are_of_one_kind(model: Model) -> None:
    runner, plan = runner_of(model), plan_of([0], [2], [0])
    runner(plan, torch.ones(2, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"inputs: got .*float32.* expected .*float64.*, as in the first step"):
        runner(plan, torch.ones(2, 16))


@pytest.mark.parametrize("sizes", [(), (30,), (0, 2)])
def test_there_is_a_size(model: Model, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"capture_sizes: got .*, expected at least one from 1 to max_tokens=24"):
        runner_of(model, capture_sizes=sizes)


@pytest.mark.parametrize("when", range(4))
@pytest.mark.parametrize("new", [[1, 1, 1], [1, 3, 1]], ids=["full", "piecewise"])
def test_after_an_exception_the_next_step_is_right(new: list[int], when: int) -> None:
    """It comes out of the second layer, as the step is compiled, runs, is recorded, or is replayed."""
    model, raises = Model(depth=2), [False]

    def maybe(x: Tensor) -> Tensor:
        if raises[0]:
            raise RuntimeError("in the middle")
        return x.clone()

    library = torch.library.Library("test_serving", "FRAGMENT")
    library.define("maybe(Tensor x) -> Tensor")
    library.impl("maybe", maybe, "CompositeExplicitAutograd")
    torch.library.register_fake("test_serving::maybe", torch.empty_like, lib=library)
    mark_splitting("test_serving::maybe")
    model.layers[1].register_forward_pre_hook(lambda layer, args: (torch.ops.test_serving.maybe(args[0]), *args[1:]))

    runner, plan = runner_of(model), plan_of([5, 5, 5], new, [4, 0, 2])
    hidden = torch.randn(plan.tokens, 16, device=DEVICE, dtype=torch.float64)
    try:
        for step in range(4):
            raises[0] = step == when
            replayed = new == [1, 1, 1] and step == 3  # then nothing of it runs in Python
            if raises[0] and not replayed:
                others = [state[[1, 3, 5]].clone() for state in model.states]
                with pytest.raises(RuntimeError, match="in the middle"):
                    runner(plan, hidden)
                assert runner.backend.recording is None
                torch.testing.assert_close([state[[1, 3, 5]] for state in model.states], others)
        raises[0] = False
        for _ in range(3):
            as_eager(runner, model, plan)
    finally:
        mark_splitting("test_serving::maybe", False)
        library._destroy()


def test_many_runners_over_one_class_of_models() -> None:
    """torch.compile limits recompiles by code object, which models of one class share; runners do not."""
    for _ in range(6):
        small = Model(1)
        runner = runner_of(small, graphs=None)
        for computed, new in ((0, 3), (3, 1)):
            as_eager(runner, small, plan_of([computed], [new], [0]))


def test_steps_that_share_prefixes_are_as_in_the_eager_model(model: Model) -> None:
    """One that keeps a state runs piecewise; decodes, with the same tensors in their plan, as one graph."""
    runner = runner_of(model, shared=True, rounds=2)
    runner.prepare(torch.zeros(1, 16, device=DEVICE, dtype=torch.float64))
    steps = [
        plan_of([0, 0], [5, 3], [1, 2], keep=[{2: 4}, None], rounds=2),
        plan_of([2], [1], [3], sources=[4], rounds=2),
        plan_of([5, 3, 3], [1, 1, 1], [1, 2, 3], sources=[None] * 3, rounds=2),
    ]
    for plan in steps * 2:
        as_eager(runner, model, plan)
    assert runner.steps == {"piecewise": 4, "full": 2}
    assert len(runner.backend.graphs) == 2  # one of them for a single token
