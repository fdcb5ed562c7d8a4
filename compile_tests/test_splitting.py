"""Inductor's partition and the FX split cut a model at the same ops, and change none of its numbers."""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from mamba_ops import registry
from mamba_ops.commands.watch import watch_compiler
from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, Mamba3, ShortConv
from mamba_ops.registry import mark_splitting, record_selections, splitting_ops, use_backend
from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
HIDDEN, SLOTS = 16, 6
OURS = ["mamba_ops::mamba2_mixing", "mamba_ops::gdn_mixing", "mamba_ops::mamba_mixing"]

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "_no_grad")


@pytest.fixture
def _no_grad() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # cuts are what is looked at; whoever else is installed is not asked
        yield


class Model(nn.Module):
    """A Mamba-2, a gated delta net and a Mamba layer, and a user's own op after the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [
            Mamba2(HIDDEN, heads=4, head_dim=8, dstate=8, chunk_size=8),
            GatedDeltaNet(HIDDEN, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
            Mamba(HIDDEN, d_inner=24, dstate=8, dt_rank=3),
        ]
        self.layers = nn.ModuleList(layers).to(DEVICE)
        self.caches = [layer.empty_caches(SLOTS) for layer in layers]

    def forward(self, hidden: Tensor, plan: Plan) -> Tensor:
        for i, (layer, caches) in enumerate(zip(self.layers, self.caches, strict=True)):
            hidden = hidden + layer(hidden.sin(), *caches, plan=plan)
            if i == 1:
                hidden = torch.ops.compile_tests.turned(hidden) + hidden
        return hidden

    def forget(self) -> None:
        for caches in self.caches:
            for cache in caches:
                cache.zero_()


class Events:
    """What happens in a call: "piece" for a piece, and an op by its name."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __call__(self, name: str) -> None:
        self.log.append((name, None))

    def told(self, function: Any) -> Any:
        """A piece that says when it runs."""

        def run(*args: Any) -> Any:
            self("piece")
            return function(*args)

        return run

    def of_a_call(self, compiled: Callable[..., Tensor], model: Model) -> list[str]:
        """Call it on a mixed batch, twice, and compare with the eager model. Return the second call's events."""
        plan = Plan.of([3, 0, 8], [1, 5, 4], [5, 0, 2], max_requests=SLOTS, device=DEVICE)
        hidden = torch.randn(plan.tokens, HIDDEN, device=DEVICE)
        marked = hidden.clone()
        torch._dynamo.mark_dynamic(marked, 0)
        model.forget()
        expected = [model(hidden, plan) for _ in range(2)]
        model.forget()
        got = [compiled(marked, plan).clone()]
        with record_selections() as self.log:  # the registry writes to the same list
            got.append(compiled(marked, plan).clone())
        torch.testing.assert_close(got, expected)
        names = [name for name, _ in self.log]
        return [name for name in names if name == "piece" or name in splitting_ops()]


@pytest.fixture
def events() -> Iterator[Events]:
    """The user's op is there meanwhile."""
    happened = Events()

    def turned(x: Tensor) -> Tensor:
        happened("compile_tests::turned")
        return x.flip(-1)

    library = torch.library.Library("compile_tests", "FRAGMENT")
    library.define("turned(Tensor x) -> Tensor")
    library.impl("turned", turned, "CompositeExplicitAutograd")
    torch.library.register_fake("compile_tests::turned", torch.empty_like, lib=library)
    with mock.patch.dict(registry.splitting._marked, clear=True):  # back again afterwards
        yield happened
    library._destroy()


def by_fx(model: Model, events: Events) -> list[str]:
    """Split by `split_graph`, run the pieces as they are."""

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        module, pieces = registry.split_graph(gm)
        for piece in pieces:
            if not piece.ops:
                setattr(module, piece.name, nn.Module())
                getattr(module, piece.name).forward = events.told(piece.module)
        return module

    torch._dynamo.reset()
    return events.of_a_call(torch.compile(model, backend=backend, fullgraph=True, dynamic=False), model)


@pytest.fixture
def by_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Model, Events], list[str]]]:
    """Partitioned by Inductor, with its own hook around each part.

    On a CPU it partitions nothing, as there is nothing to capture: there it takes every kernel for a GPU's.
    """
    from torch._inductor import config, utils
    from torch._inductor.scheduler import BaseSchedulerNode

    def run(model: Model, events: Events) -> list[str]:
        utils.set_customized_partition_wrappers(lambda part, metadata: events.told(part))
        torch._dynamo.reset()
        with registry.partition_at_splitting_ops():
            return events.of_a_call(torch.compile(model, fullgraph=True, dynamic=False), model)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(BaseSchedulerNode, "is_gpu", lambda node: True)
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    with config.patch(fx_graph_cache=False), caches:  # cached code is as it was partitioned then
        yield run
    utils.set_customized_partition_wrappers(None)  # type: ignore[arg-type]


def pieces_between(*ops: str) -> list[str]:
    return ["piece", *(name for op in ops for name in (op, "piece"))]


def test_a_model_has_twice_as_many_pieces_as_layers_and_one(events: Events) -> None:
    assert by_fx(Model(), events) == pieces_between(*OURS)


def test_both_ways_cut_at_the_same_ops(events: Events, by_inductor: Any) -> None:
    """Also at one that the user marked, whose output is no argument."""
    mark_splitting("compile_tests::turned")
    model = Model()
    expected = pieces_between(*OURS[:2], "compile_tests::turned", OURS[2])
    assert by_fx(model, events) == expected
    assert by_inductor(model, events) == expected


def test_an_op_of_ours_that_is_unmarked_is_no_cut(events: Events) -> None:
    mark_splitting(OURS[1], False)
    happened = by_fx(Model(), events)
    assert happened == pieces_between(OURS[0], OURS[2])


@pytest.mark.gpu
def test_the_pieces_are_captured(events: Events) -> None:
    """Inductor's own CUDA graphs around the ops, which run eagerly: every piece is recorded, none is skipped."""
    model = Model()
    plan = Plan.of([3, 0, 8], [1, 5, 4], [5, 0, 2], max_requests=SLOTS, device=DEVICE)
    hidden = torch.randn(plan.tokens, HIDDEN, device=DEVICE)
    model.forget()
    expected = [model(hidden, plan).clone() for _ in range(5)]
    model.forget()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    got = []
    with watch_compiler() as watch, registry.partition_at_splitting_ops():
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            got.append(compiled(hidden, plan).clone())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert watch.recordings == len(OURS) + 1
    assert counters["inductor"]["cudagraph_skips"] == 0


# -- stand-ins of how engines cut -------------------------------------------------------------------------------------


class EveryMixer(nn.Module):
    """A layer of each kind that has a mixing op."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [
            Mamba(HIDDEN, d_inner=24, dstate=8, dt_rank=3),
            Mamba2(HIDDEN, heads=4, head_dim=8, dstate=8, chunk_size=8),
            GatedDeltaNet(HIDDEN, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
            KimiDeltaAttention(HIDDEN, num_heads=2, head_dim=8),
            ShortConv(HIDDEN),
            Mamba3(HIDDEN, heads=2, head_dim=8, dstate=8, chunk_size=8),
        ]
        self.layers = nn.ModuleList(layers).to(DEVICE)
        self.caches = [layer.empty_caches(SLOTS) for layer in layers]

    def forward(self, hidden: Tensor, plan: Plan) -> Tensor:
        for layer, caches in zip(self.layers, self.caches, strict=True):
            hidden = hidden + layer(hidden.sin(), *caches, plan=plan)
        return hidden

    def forget(self) -> None:
        for caches in self.caches:
            for cache in caches:
                cache.zero_()


MIXING = [f"mamba_ops::{kind}_mixing" for kind in ("mamba", "mamba2", "gdn", "kda", "short_conv", "mamba3")]


def as_vllm_splits(target: Any, ops: list[str]) -> bool:
    """The rule of vLLM 0.33's FX split: a packet by its qualified name, an overload with its own name or without."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name in ops
    if not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name
    return name in ops or f"{name}.{target._overloadname}" in ops


def as_sglang_splits(target: Any, ops: list[str]) -> bool:
    """The rule of SGLang's piecewise graphs."""
    return str(target) in ops


def numbers_of(rule: Callable[[Any, list[str]], bool], ops: list[str], gm: GraphModule) -> dict[Any, int]:
    """Number the pieces as both engines do: each splitting op begins one, and the node after it the next."""
    number, found, cuts = 0, {}, False
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        splits = node.op == "call_function" and rule(node.target, ops)
        number += splits or cuts
        cuts, found[node] = splits, number
    return found


@pytest.mark.parametrize("rule", [as_vllm_splits, as_sglang_splits])
def test_engines_cut_at_every_mixing_op(rule: Callable[[Any, list[str]], bool]) -> None:
    """By the list as it is: a piece for each op, with nothing else in it, and one between, before and after."""
    from torch.fx.passes.split_module import split_module

    ops, pieces = splitting_ops(as_targets=rule is as_sglang_splits), list[list[str]]()

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        numbers = numbers_of(rule, ops, gm)
        module = split_module(gm, gm, lambda node: numbers[node], keep_original_order=True)
        for _, piece in module.named_children():
            nodes = [node for node in piece.graph.nodes if node.op == "call_function"]
            pieces.append([registry._torch.schema_name(n.target) for n in nodes if rule(n.target, ops)])
            assert not pieces[-1] or len(nodes) == 1
        return module

    model, events = EveryMixer(), Events()
    torch._dynamo.reset()
    happened = events.of_a_call(torch.compile(model, backend=backend, fullgraph=True, dynamic=False), model)
    assert happened == MIXING
    assert pieces == [part for op in MIXING for part in ([], [op])] + [[]]


def test_inductor_partitions_at_every_mixing_op(by_inductor: Any) -> None:
    """As vLLM has it with use_inductor_graph_partition: the list in Inductor's own option."""
    assert by_inductor(EveryMixer(), Events()) == pieces_between(*MIXING)


def test_every_mixing_op_is_in_the_list() -> None:
    mixing = {op.qualname for op in registry.ops().values() if "counts" in {p.name for p in op.parameters}}
    assert mixing == set(MIXING) <= set(splitting_ops())
    targets = splitting_ops(as_targets=True)
    for name in mixing:
        packet = getattr(torch.ops.mamba_ops, name.partition("::")[2])
        assert {str(packet), str(packet.default)} <= set(targets)
