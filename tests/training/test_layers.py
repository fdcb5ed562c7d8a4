"""Layers that train as users have them: with adapters around their projections."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba_ops.registry import answering
from mamba_ops.serving import Plan
from tests.layers import HIDDEN, KINDS, new_layer


class Adapted(nn.Module):
    """A projection with something that learns beside it, as adapters are put around one."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.added = nn.Parameter(torch.zeros_like(base.weight))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(x, self.added)


def adapted(layer: nn.Module) -> dict[str, Adapted]:
    """Put an adapter around every projection of a layer."""
    found = {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        setattr(layer.get_submodule(parent), last, Adapted(module))
    return {name: layer.get_submodule(name) for name in found}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_take_part(kind: str) -> None:
    """All of them: what they add is in the output of sequences and of steps, and they get its gradients."""
    layer = new_layer(kind, torch.device("cpu")).double()
    x, step = (torch.randn(2, *length, HIDDEN, dtype=torch.double) for length in ((7,), ()))

    def outputs() -> list[Tensor]:
        caches = layer.empty_caches(2, state_dtype=torch.double)
        with torch.no_grad():
            return [layer(x, *caches), layer.step(step, *caches)]

    before, adapters = outputs(), adapted(layer)
    assert len(adapters) >= 2
    for got, expected in zip(outputs(), before, strict=True):
        torch.testing.assert_close(got, expected)
    layer(x).sin().sum().backward()
    for name, adapter in adapters.items():
        assert adapter.added.grad is not None, name
        assert adapter.added.grad.count_nonzero(), name
        with torch.no_grad():
            adapter.added.fill_(0.01)
        for got, expected in zip(outputs(), before, strict=True):
            assert not torch.equal(got, expected), name
        adapter.added.data.zero_()


@pytest.mark.parametrize("name", ["x_proj", "dt_proj"])
def test_a_plan_without_adapters_is_refused(name: str) -> None:
    """mamba_mixing reads the weights of the projections that are inside it."""
    layer: Any = new_layer("mamba", torch.device("cpu"))
    setattr(layer, name, Adapted(getattr(layer, name)))
    plan = Plan.zeros(3)
    expected = f"Mamba: plan: got a layer whose {name} is a Adapted, expected an nn.Linear"
    with torch.no_grad(), pytest.raises(ValueError, match=expected):
        layer(torch.randn(3, HIDDEN), *layer.empty_caches(1), plan=plan)


def test_functions_that_answer_have_code_of_their_own() -> None:
    """Dynamo counts how often code is compiled anew, and ends at a limit."""

    @answering
    def one(x: Tensor) -> Tensor:
        return x

    @answering
    def two(x: Tensor) -> Tensor:
        return x + 1

    assert one.__code__ is not two.__code__
    assert (one.__code__.co_name, two.__code__.co_name) == ("one", "two")
