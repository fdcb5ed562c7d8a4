"""Ops whose bodies call other ops: names of backends act on what is inside."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.registry import (
    Namespace,
    NoBackendError,
    Op,
    RegistryError,
    explain,
    record_selections,
    require_out,
    use_backend,
)
from tests.registry.toys import adapter, call


@pytest.fixture
def twice(toys: Namespace, add: Op[...]) -> Op[...]:
    @toys.op(mutates=("total", "out"), composed=True)
    def twice(total: Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Add x to total two times."""
        add.check_supported(total, x)
        total += x
        return require_out(out).copy_(add(total, x))

    @twice.allocate_output
    def _output(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    return twice


def test_it_runs_anywhere_on_what_is_inside(twice: Op[...], backend: Any) -> None:
    assert list(twice.kernels) == ["composed"]
    with record_selections() as record:
        assert call(twice) == 2.0
    assert record == [("toys::twice", "composed"), ("toys::add", "torch")]


def test_a_bare_name_acts_on_what_is_inside(twice: Op[...], add: Op[...], backend: Any) -> None:
    """Also if a backend of its own would come first."""
    backend("marker", priority=-1).implements(add)(adapter(7))
    vendor = backend("vendor", priority=1)

    @vendor.implements(twice)
    def _twice(total: Tensor, x: Tensor, *, output: Tensor) -> None:
        output.fill_(9)

    assert call(twice) == 9.0
    with use_backend("marker"):
        assert call(twice) == 7.0
        assert explain(twice, torch.zeros(3), torch.ones(3)).backend == "composed"
        with use_backend("vendor"):
            assert call(twice) == 9.0
    for name in ("torch", "composed"):
        with use_backend(name):
            assert call(twice) == 2.0
    with use_backend(twice="composed", add="marker"):
        assert call(twice) == 7.0


def test_it_is_never_bound_to_who_has_no_kernel_for_it(twice: Op[...], add: Op[...], backend: Any) -> None:
    backend("marker", priority=-1).implements(add)(adapter(7))
    with pytest.raises(RegistryError, match="'marker' has no kernel for toys::twice; it can run on: composed"):
        use_backend(twice="marker")


def test_require_refuses_before_anything_is_written(twice: Op[...], add: Op[...], backend: Any) -> None:
    backend("picky").implements(add, unsupported=lambda x: "is picky")(adapter(7))
    total = torch.zeros(3)
    with use_backend("picky"), pytest.raises(NoBackendError, match="is picky"):
        twice(total, torch.ones(3))
    assert torch.equal(total, torch.zeros(3))


def test_require_asks_what_is_asked_at_every_call_too(add: Op[...], backend: Any) -> None:
    backend("picky").implements(add, unsupported_layout=lambda x: None if x.is_contiguous() else "wants x dense")(
        adapter(7)
    )
    add.check_supported(torch.zeros(3), torch.ones(6)[::2])  # nobody asked for it by name
    with use_backend("picky"):
        add.check_supported(torch.zeros(3), torch.ones(3))
        with pytest.raises(NoBackendError, match="wants x dense"):
            add.check_supported(torch.zeros(3), torch.ones(6)[::2])


def test_a_partial_kernel_leaves_what_it_refuses_to_what_is_inside(twice: Op[...], add: Op[...], backend: Any) -> None:
    """In the default order and for a bare name of its backend, without a word; for the op's own name it refuses."""
    marker = backend("marker", priority=1)
    marker.implements(add)(adapter(7))

    @marker.implements(twice, unsupported=lambda x: "takes one row" if len(x) > 1 else None, partial=True)
    def _twice(total: Tensor, x: Tensor, *, output: Tensor) -> None:
        output.fill_(9)

    def run(rows: int) -> float:
        return float(twice(torch.zeros(rows), torch.ones(rows))[0])

    for context in (nullcontext, lambda: use_backend("marker")):
        with context(), record_selections() as record:
            assert run(1) == 9.0
            assert run(3) == 7.0
        assert record == [("toys::twice", "marker"), ("toys::twice", "composed"), ("toys::add", "marker")]
    with use_backend("torch"), record_selections() as record:
        assert run(1) == 2.0
    assert record == [("toys::twice", "composed"), ("toys::add", "torch")]
    with use_backend(twice="marker"), pytest.raises(NoBackendError, match="takes one row"):
        run(3)


def test_only_a_composed_op_has_what_a_partial_kernel_leaves(add: Op[...], backend: Any) -> None:
    with pytest.raises(RegistryError, match="partial is for ops that are composed of others"):
        backend("marker").implements(add, partial=True)(adapter(7))
