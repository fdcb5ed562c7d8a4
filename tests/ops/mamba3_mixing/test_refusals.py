"""A backend that is asked for by name and refuses what is inside: nothing is written before that."""

import inspect
from typing import Any

import pytest
import torch

import mamba_ops
from mamba_ops.registry import Backend, use_backend


@pytest.mark.parametrize("inner", [mamba_ops.mamba_chunk_scan, mamba_ops.selective_state_update])
@pytest.mark.parametrize("name", ["base", "rounds", "speculative", "MIMO"])
def test_nothing_is_written_before_an_op_inside_refuses(inner: Any, name: str) -> None:
    kernel = inner.kernels["torch"].function

    def run(*args: Any, **kwargs: Any) -> None:
        kernel(*args, **kwargs)

    run.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    backend = Backend("unwilling", devices=None, priority=-10)
    backend.implements(inner, unsupported=lambda x: f"got {x.dim()} dimensions of x")(run)
    sample = next(s for s in mamba_ops.mamba3_mixing.make_samples("cpu", dtype=torch.float32) if s.name == name)
    before = sample.clone()
    try:
        with use_backend("unwilling"), pytest.raises(ValueError, match=r"got . dimensions of x"):
            mamba_ops.mamba3_mixing(*sample.args, **sample.kwargs)
    finally:
        backend.remove()
    for tensor, old in zip(sample.args, before.args, strict=True):
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, old)
