"""Layers on an engine's steps under torch.compile: one graph, however many requests decode or are read."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mamba_ops.audit import absent
from mamba_ops.registry import splitting_ops
from mamba_ops.serving import Plan
from tests.conftest import ABSENT, ACCELERATOR
from tests.test_layers_plan import HIDDEN, LAYERS

DEVICE = ACCELERATOR or torch.device("cpu")
SLOTS = 24
OPS = {name: f"{name.split(',')[0].replace(' ', '_')}_mixing" for name in LAYERS}
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if "," in name else ()) for name in LAYERS
]  # one of each op every day

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


def random_plans(device: torch.device | str, count: int, *, seed: int = 0) -> Iterator[Plan]:
    """Plans of 0, 1 and many decodes and prefills; the first one has many of both, and no two sizes that agree."""
    rng = random.Random(seed)
    yield Plan.of([3] * 5 + [0] * 3, [1] * 5 + [9, 20, 2], range(8), max_requests=SLOTS, device=device)
    for _ in range(count - 1):
        decodes, prefills = rng.choice((0, 1, 7)), rng.choice((0, 1, 5))
        computed = [rng.randint(1, 30) for _ in range(decodes)] + [rng.choice((0, 16)) for _ in range(prefills)]
        new = [1] * decodes + [rng.randint(2, 40) for _ in range(prefills)]
        slots = rng.sample(range(SLOTS), decodes + prefills)
        if new:
            yield Plan.of(computed, new, slots, max_requests=SLOTS, device=device)
        else:
            yield Plan.zeros(rng.randint(2, 9), max_requests=SLOTS, device=device)


def caches_of(layer: Any) -> list[Tensor]:
    return [torch.randn_like(cache) for cache in layer.empty_caches(SLOTS)]


@pytest.mark.parametrize("name", LAYERS)
def test_thirty_mixed_batches_are_one_graph(name: str) -> None:
    """One more for a single token, and one for none."""
    layer: Any = LAYERS[name]().to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    single = 0
    for plan in random_plans(DEVICE, 30):
        hidden, caches = torch.randn(plan.tokens, HIDDEN, device=DEVICE), caches_of(layer)
        copies = [cache.clone() for cache in caches]
        torch.testing.assert_close(compiled(hidden, *copies, plan=plan), layer(hidden, *caches, plan=plan))
        torch.testing.assert_close(copies, caches)
        single |= plan.tokens == 1
        assert counters["stats"]["unique_graphs"] == 1 + single
    none = Plan.of([], [], [], max_requests=SLOTS, device=DEVICE)
    assert compiled(torch.randn(0, HIDDEN, device=DEVICE), *caches_of(layer), plan=none).shape == (0, HIDDEN)
    assert counters["stats"]["unique_graphs"] == 2 + single


def test_engines_can_cut_at_every_mixing_op() -> None:
    assert {f"mamba_ops::{op}" for op in OPS.values()} <= set(splitting_ops())


class _Planned(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = LAYERS[name]()

    def forward(self, hidden: Tensor, caches: Any, plan: Any) -> Tensor:
        out: Tensor = self.layer(hidden, *caches, plan=plan)
        return out


def traced(name: str, *, device: str) -> absent.Trace:
    """In a child process: a few mixed batches."""
    tracer = absent.Tracer(_Planned(name), device=device, dynamic=True)
    for plan in random_plans("cpu", 4):
        tracer(torch.randn(plan.tokens, HIDDEN), caches_of(LAYERS[name]()), plan)
    return tracer.trace


@pytest.mark.parametrize("device", ABSENT)
@pytest.mark.parametrize("name", NAMES)
def test_mixed_batches_are_one_graph_for_an_absent_device(name: str, device: str) -> None:
    trace = absent.run("compile_tests.test_plans:traced", name, device=device)
    assert not trace["breaks"]
    assert not trace["recompiles"]
    [graph] = trace["graphs"]
    assert [op.split(".")[1] for op in graph["ops"] if op.startswith("mamba_ops.")] == [OPS[name]]
