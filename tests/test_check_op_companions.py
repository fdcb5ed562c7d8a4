"""`mamba_ops.testing.check_op` on the companions of an op that records gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.registry import Namespace, Op, Sample, require_out
from mamba_ops.testing import check_op
from mamba_ops.testing.op_checks import COMPILED, COPIES, NUMBERS, OPCHECK, UNTOUCHED, WRITTEN
from tests.training.gradients import TRAINED

Body = Callable[[Any], None]


def right(call: Any) -> None:
    call.grad_x.copy_(2 * call.x * call.grad_output)


def not_written(call: Any) -> None:
    call.grad_x[1:] = 2 * call.x[1:] * call.grad_output[1:]


def input_overwritten(call: Any) -> None:
    right(call)
    call.grad_output.zero_()


def in_half_precision(call: Any) -> None:
    call.grad_x.copy_(2 * call.x.half() * call.grad_output)


def half_of_it(call: Any) -> None:
    call.grad_x.copy_(call.x * call.grad_output)


def oracle(grad_output: Tensor, x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return 2 * x * grad_output


@pytest.fixture
def declare() -> Iterator[Callable[[Body], Op[...]]]:
    """Declares a toy op, the square of each number, with a backward."""
    namespace = Namespace("squares")

    def declare(backward: Body) -> Op[...]:
        @namespace.op()
        def square(x: Tensor, *, out: Tensor | None = None) -> Tensor:
            return require_out(out).copy_(x * x)

        def new(x: Tensor) -> Tensor:
            return x.new_empty(x.shape)

        square.allocate_output(new)

        @square.training(differentiable=("x",), results={"output": new})
        def _forward(x: Tensor, *, output: Tensor) -> None:
            square.call_undispatched(x, out=output)

        square.backward(backward)

        @square.training_samples
        def _samples(device: torch.device, *, dtype: torch.dtype = torch.float32) -> Iterator[Sample]:
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            yield Sample("base", (x,))
            yield Sample("transposed", (x.t(),))

        return square

    yield declare
    namespace.remove()


def test_right_companions_pass(declare: Callable[[Body], Op[...]]) -> None:
    op = declare(right)
    for companion, given in ((op.forward_op, None), (op.backward_op, None), (op.backward_op, oracle)):
        done = check_op(companion, given, backends=["torch"], dtype=torch.bfloat16)
        calls = dict.fromkeys((NUMBERS, WRITTEN, UNTOUCHED, OPCHECK, COMPILED), 2)
        assert done.counts == {**calls, COPIES: 1}


@pytest.mark.parametrize(
    ("fault", "by", "says"),
    [
        (not_written, WRITTEN, "8 of 24 elements of grad_x are NaN"),
        (input_overwritten, UNTOUCHED, "grad_output was touched"),
        (in_half_precision, NUMBERS, "grad_x: .* elements outside the budget"),
        (half_of_it, NUMBERS, "grad_x: 24 of 24 elements outside the budget"),
    ],
)
def test_a_planted_fault_is_found(declare: Callable[[Body], Op[...]], fault: Body, by: str, says: str) -> None:
    op = declare(fault)
    with pytest.raises(AssertionError, match=f"^squares::square_backward on torch, sample 'base': {by}: .*{says}"):
        check_op(op.backward_op, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_ours_pass(op: Op[...]) -> None:
    for companion in (op.forward_states_op, op.backward_op):
        done = check_op(companion, backends=["torch"])
        assert done.counts[NUMBERS] == done.counts[OPCHECK] > 5
