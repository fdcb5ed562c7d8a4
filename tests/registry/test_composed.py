"""Ops whose bodies call other ops: names of backends act on what is inside."""

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
