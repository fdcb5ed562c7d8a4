"""Compiling costs one layer of each kind, not each layer: nothing in a layer's graph says which layer it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR
from tests.test_layers_plan import HIDDEN, LAYERS

DEVICE = ACCELERATOR or torch.device("cpu")
DEPTH = 6
SLOTS = 9

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


class Model(nn.Module):
    """Alike layers one after the other, each with caches of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LAYERS[name]().to(DEVICE) for _ in range(DEPTH))

    def forward(self, hidden: Tensor, caches: list[list[Tensor]], plan: Plan) -> Tensor:
        for layer, own in zip(self.layers, caches, strict=True):
            hidden = hidden + layer(hidden, *own, plan=plan)
        return hidden

    def arguments(self, decodes: int = 2) -> tuple[Tensor, list[list[Tensor]], Plan]:
        computed, new = [4] * decodes + [0, 0], [1] * decodes + [7, 12]
        plan = Plan.of(computed, new, range(len(new)), max_requests=SLOTS, device=DEVICE)
        torch.manual_seed(0)
        hidden = torch.randn(plan.tokens, HIDDEN, device=DEVICE)
        layers: Any = self.layers
        return hidden, [[torch.randn_like(cache) for cache in layer.empty_caches(SLOTS)] for layer in layers], plan


class Keeping:
    """A backend that compiles nothing and keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph: fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(graph)
        return graph


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compiled_one_by_one_share_one_graph(name: str) -> None:
    model, kept = Model(name), Keeping()
    expected = model(*model.arguments())
    layers: Any = model.layers
    for layer in layers:
        layer.compile(backend=kept, fullgraph=True, dynamic=True)
    torch.testing.assert_close(model(*model.arguments()), expected)
    model(*model.arguments(decodes=3))
    assert len(kept.graphs) == 1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", LAYERS)
def test_in_a_whole_models_graph_all_layers_look_alike(name: str) -> None:
    model, kept = Model(name), Keeping()
    torch.compile(model, backend=kept, fullgraph=True, dynamic=True)(*model.arguments())
    (graph,) = kept.graphs
    seen = []
    for node in graph.graph.nodes:
        if "mamba_ops" in str(node.target) and "mixing" in str(node.target):
            values = [*node.args, *node.kwargs.values()]
            seen.append([value for value in values if not isinstance(value, fx.Node)])
    assert len(seen) == DEPTH
    assert all(constants == seen[0] for constants in seen)
    assert not any(isinstance(value, str) for value in seen[0])
