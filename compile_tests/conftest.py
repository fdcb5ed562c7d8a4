"""The same ground as under the tests, and a backend that leaves a mark."""

from collections.abc import Iterator

import pytest
from torch import Tensor

import mamba_ops
from mamba_ops.registry import Backend
from tests.conftest import (
    ACCELERATOR,
    device,
    forget_captures,
    fresh_dynamo,
    no_grad,
    pytest_collection,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_runtest_setup,
)

__all__ = [
    "device",
    "forget_captures",
    "fresh_dynamo",
    "no_grad",
    "pytest_collection",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_runtest_setup",
]

MARK = 1000.0


@pytest.fixture
def marker() -> Iterator[Backend]:
    """A backend that does what another does and adds a mark to the output, so that the numbers say who ran."""
    backend = Backend("marker", devices=None, priority=-10)
    conv = mamba_ops.causal_conv1d_update.kernels["torch" if ACCELERATOR is None else "triton"].function

    @backend.implements(mamba_ops.causal_conv1d_update)
    def _conv(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_accepted_tokens: Tensor | None = None,
        silu: bool = True,
        null_slot: int = -1,
        output: Tensor,
    ) -> None:
        given = {"slots": slots, "cu_seqlens": cu_seqlens, "num_accepted_tokens": num_accepted_tokens}
        conv(x, conv_state, weight, bias, **given, silu=silu, null_slot=null_slot, output=output)
        output.add_(MARK)

    yield backend
    backend.remove()
