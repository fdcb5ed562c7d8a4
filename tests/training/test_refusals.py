"""What ops that record gradients refuse, in a sentence: indices of no rows, tensors that torch saves for no backward,
numbers that would lose a gradient, tangents.
"""

import pkgutil
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mamba_ops import functional
from mamba_ops.registry import Op
from mamba_ops.registry.errors import ArgumentTypeError
from tests.harness import OPS
from tests.training.gradients import TRAINED, is_float, named


def call_of(op: Op[...], name: str) -> dict[str, Any]:
    """A call of one of the op's companions, by the name of a sample."""
    [sample] = [s for s in op.make_samples("cpu") if s.name == name]
    return named(op, sample.clone())


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_a_backward_looks_at_its_rows(op: Op[...]) -> None:
    call = call_of(op.backward_op, next(s.name for s in op.backward_op.make_samples("cpu") if "packed" in s.name))
    ends: Tensor = call["cu_seqlens"]
    op.backward_op(**call)
    beyond = ends.clone()
    beyond[-1] = call["grad_output"].shape[0] + 1
    for wrong, got in ((ends - 1, "-1 as its first entry"), (beyond, f"{beyond[-1]} for the end of row")):
        with pytest.raises(ValueError, match=rf"^mamba_ops::{op.name}_backward: cu_seqlens: got {got}"):
            op.backward_op(**call | {"cu_seqlens": wrong})


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_tensors_of_inference_mode_are_not_saved(op: Op[...]) -> None:
    call = call_of(op.forward_states_op, op.forward_states_op.make_samples("cpu")[0].name)
    names = [n for n, v in call.items() if is_float(v)]
    call[names[1]].requires_grad_()
    with torch.inference_mode():
        call[names[0]] = call[names[0]].clone()
    others = {n: v for n, v in call.items() if n != "initial_states"}
    for function, arguments in ((op, others), (getattr(functional, op.name), call)):
        with (
            torch.enable_grad(),
            pytest.raises(ValueError, match=rf": {names[0]}: got a tensor made in inference mode"),
        ):
            function(**arguments)
        with torch.no_grad():
            function(**arguments)


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_numbers_of_recorded_calls_are_numbers(op: Op[...]) -> None:
    """No gradient goes to a number, and none is rounded: torch would take 0.5 of numpy for 0."""
    call = call_of(op.forward_states_op, op.forward_states_op.make_samples("cpu")[0].name)
    call["x" if "x" in call else "q"].requires_grad_()
    numbers = [p for p in op.forward_states_op._called if p.annotation in (int, bool, float, float | None)]
    assert numbers
    for p in numbers:
        wrong: list[Any] = ["a word", [1]]
        wrong += [torch.tensor(0.5, requires_grad=True)] if p.annotation not in (int, bool) else [np.float32(0.5)]
        for value in wrong:
            with torch.enable_grad(), pytest.raises(ArgumentTypeError, match=rf": {p.name}: got .*, expected "):
                getattr(functional, op.name)(**call | {p.name: value})


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_a_backward_loses_no_tangent(op: Op[...]) -> None:
    """Neither one of the gradient that it is given, nor one of what was saved."""
    call = call_of(op.backward_op, op.backward_op.make_samples("cpu")[0].name)
    for name in [n for n, v in call.items() if is_float(v)]:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode differentiation"):
            op.backward_op(**call | {name: forward_ad.make_dual(call[name], torch.ones_like(call[name]))})
    forward = call_of(op.forward_op, op.forward_op.make_samples("cpu")[0].name) | {"initial_states": None}
    leaf = forward["x" if "x" in forward else "q"].requires_grad_()
    with torch.enable_grad():
        output = op(**{n: v for n, v in forward.items() if n != "initial_states"})
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.autograd.grad(output, leaf, forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output)))


@pytest.mark.parametrize("op", [op for op in OPS if not op.recorded_parameters], ids=lambda op: op.name)
def test_an_op_without_gradients_names_what_has_them(op: Op[...]) -> None:
    sample = op.make_samples("cpu")[0].clone()
    args = [value.requires_grad_() if is_float(value) else value for value in sample.args]
    with torch.enable_grad(), pytest.raises(ValueError, match="does not record gradients, ") as error:
        op(*args, **sample.kwargs)
    [name] = re.findall(r"mamba_ops\.(?:functional|layers)\.\w+", str(error.value))
    assert callable(pkgutil.resolve_name(name))
