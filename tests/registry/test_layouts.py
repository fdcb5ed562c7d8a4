"""Caches that a backend keeps in a layout of its own: no other backend is given them, and it gets no other's."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import DeclarationError, NoBackendError, Op, explain, renew_caches, use_backend
from tests.registry.toys import adapter


@pytest.fixture
def packed(add: Op[...], backend: Any) -> Any:
    made = backend("packed", priority=-1)
    made.implements(add, layouts={"total": "two values a word"})(adapter(2))
    return made


def run(op: Op[...], total: Tensor) -> float:
    return float(op(total, torch.ones(3))[0])


SENTENCE = (
    "keeps total in two values a word, and torch wrote this one in the op's own layout; give it new caches, or these "
    "after mamba_ops.registry.renew_caches()"
)


@pytest.mark.usefixtures("packed")
def test_a_swap_to_another_layout_is_refused_unless_the_caches_are_new(add: Op[...]) -> None:
    old = torch.zeros(3)
    assert run(add, old) == 1.0
    with use_backend("packed"):
        with pytest.raises(NoBackendError) as refused:
            run(add, old)
        assert dict(refused.value.reasons) == {"packed": SENTENCE}
        assert old.tolist() == [1.0] * 3  # nothing was written
        found = explain(add, old, torch.ones(3))
        assert (found.backend, found.reasons["packed"]) == (None, SENTENCE)
        assert run(add, torch.zeros(3)) == 2.0
        new = torch.zeros(3)
        assert run(add, new) == run(add, new) == 2.0
    with use_backend("torch"), pytest.raises(NoBackendError, match="packed wrote this one in two values a word"):
        run(add, new)
    assert run(add, old) == 2.0  # the reference adds up


@pytest.mark.usefixtures("packed")
def test_caches_can_be_made_new(add: Op[...]) -> None:
    cache = torch.zeros(3)
    run(add, cache)
    before, token = registry.generation(), registry.token.token(torch.empty(0))
    renew_caches(cache)
    assert not cache.any()
    assert registry.generation() > before
    renewed = registry.token.token(torch.empty(0))  # so that no recording from before is replayed
    assert token is not None
    assert renewed is not None
    assert token.shape != renewed.shape
    with use_backend("packed"):
        assert run(add, cache) == 2.0


@pytest.mark.usefixtures("packed")
def test_memory_that_was_freed_is_new(add: Op[...]) -> None:
    """An allocator hands the same address out again."""
    for name in ("torch", "packed") * 4:
        with use_backend(name):
            run(add, torch.zeros(3))


def test_the_default_order_goes_on_to_a_backend_of_the_caches_layout(add: Op[...], backend: Any) -> None:
    cache = torch.zeros(3)
    run(add, cache)
    backend("packed", priority=5).implements(add, layouts={"total": "pairs"})(adapter(2))
    run(add, torch.zeros(3))
    with use_backend("torch"):
        run(add, cache)
    with pytest.warns(
        RuntimeWarning, match="toys::add runs on torch because packed does not take the call: keeps total"
    ):
        assert float(add(cache, torch.ones(3))[0]) == 3.0


def test_a_layout_may_depend_on_the_call(add: Op[...], backend: Any) -> None:
    def layout(bias: Tensor | None) -> str | None:
        return None if bias is None else "biased"

    backend("moody", priority=-1).implements(add, layouts={"total": layout})(adapter(2))
    cache = torch.zeros(3)
    run(add, cache)
    with use_backend("moody"):
        run(add, cache)
        with pytest.raises(NoBackendError, match="keeps total in biased, and moody wrote this one in the op's own"):
            add(cache, torch.ones(3), bias=torch.ones(3))


def test_a_layout_is_of_a_cache(add: Op[...], backend: Any) -> None:
    with pytest.raises(DeclarationError, match="layouts names x, which the op does not mutate"):
        backend("odd").implements(add, layouts={"x": "odd"})(adapter(1))


def test_a_layout_on_another_device_costs_nothing_here(add: Op[...], backend: Any) -> None:
    backend("far", devices=["cuda"]).implements(add, layouts={"total": "far"})(adapter(1))
    run(add, torch.zeros(3))
    decided = [inspect.unwrap(d.kernel) for cache in add._decisions.values() for d in cache.known.values()]
    assert add.kernels["torch"].function in decided
