"""Backward passes over rows in slices: what they keep is bounded, and what they return is that of all rows at once."""

import pkgutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from mamba_ops.ops._triton import slices
from mamba_ops.registry import Op, use_backend
from tests.conftest import ACCELERATOR
from tests.training.gradients import TRAINED
from tests.training.test_training import activation, dense

DEVICE = ACCELERATOR or torch.device("cpu")
SLICED = [op for op in TRAINED if op.name != "causal_conv1d"]
"""Ops whose backward keeps much; the convolution's keeps next to nothing."""


class Allocated(TorchDispatchMode):
    """Adds up the bytes of the memory that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("empty", "new_empty", "empty_like"):
            self.nbytes += result.nbytes
        return result


def rows_of(op: Op[...], rows: int, length: int = 20) -> dict[str, Any]:
    """A call of an op's backward, of so many rows, of which the first are those of a call of fewer."""
    call = {p.name: p.default for p in op.forward_op._called} | dense(op, length)
    for name, value in call.items():
        if is_of_rows(name, value):
            generator = torch.Generator().manual_seed(len(name))
            call[name] = value[:1] * (1 + 0.1 * torch.rand((rows, *value.shape[1:]), generator=generator))
    states = op.forward_states_op.allocate(**call)[1]
    call["initial_states"] = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    call = {name: value.detach().to(DEVICE) if isinstance(value, Tensor) else value for name, value in call.items()}
    return {"grad_output": activation(call).cos(), "grad_final_states": call["initial_states"].cos(), **call}


def is_of_rows(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and name.removeprefix("grad_") not in ("A", "D", "dt_bias")


@pytest.mark.parametrize("op", SLICED, ids=lambda op: op.name)
def test_slices_return_what_all_rows_at_once_do(op: Op[...], monkeypatch: pytest.MonkeyPatch) -> None:
    call = rows_of(op, 5)
    with use_backend("triton"), torch.no_grad():
        whole = op.backward_op(**call)
        monkeypatch.setattr(slices, "WALKS", 1)
        monkeypatch.setattr(slices, "KEPT", 1)
        parts = op.backward_op(**call)
    compared = 0
    for name, expected, got in zip(op.backward_op.returns, whole, parts, strict=True):
        is_exact = is_of_rows(name, expected)
        torch.testing.assert_close(got, expected, **({"rtol": 0, "atol": 0} if is_exact else {}), msg=name)
        compared += bool(expected.numel() and expected.any())
    assert compared > 4


@pytest.mark.parametrize("op", SLICED, ids=lambda op: op.name)
def test_slices_keep_the_memory_of_one(op: Op[...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in slices of one keep what one row does, beside what is returned and sums by slice."""
    monkeypatch.setattr(slices, "WALKS", 1)
    monkeypatch.setattr(slices, "KEPT", 1)
    kept = []
    for rows in (1, 5):
        backward = op.backward_op
        values = backward.fill(backward.bind((), rows_of(op, rows)))
        with torch.no_grad(), Allocated() as allocated:
            pkgutil.resolve_name(backward.kernels["triton"].implementation)(backward.arguments(**values))
        shares = sum(values[n].nbytes for n in backward.returns if not is_of_rows(n, values[n]))
        kept.append(allocated.nbytes - (rows * shares if rows > 1 else 0))
    assert 0 < kept[1] <= kept[0]


@pytest.mark.parametrize("op", SLICED, ids=lambda op: op.name)
def test_rows_without_tokens_are_not_sliced(op: Op[...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their final states are their initial states; nothing else has a gradient."""
    call = rows_of(op, 5, length=0)
    monkeypatch.setattr(slices, "WALKS", 1)
    monkeypatch.setattr(slices, "KEPT", 1)
    with use_backend("triton"), torch.no_grad():
        gradients = dict(zip(op.backward_op.returns, op.backward_op(**call), strict=True))
    assert torch.equal(gradients.pop("grad_initial_states"), call["grad_final_states"])
    assert len(gradients) > 4
    assert not any(gradient.count_nonzero() for gradient in gradients.values())
