"""The judge's budget where one call's roundings do not bound another's: wider, and still one that catches bugs."""

from functools import partial
from typing import Any

import pytest
import torch

import mamba_ops
from mamba_ops.testing import judge as testing
from tests.harness import beside, expected, expected_beside
from tests.training import gradients

OP = mamba_ops.gdn_mixing
SAMPLE = testing.with_output(OP, next(s for s in OP.make_samples("cpu") if s.name == "speculative"))


def test_calls_beside_one_are_as_it_is_but_for_last_bits() -> None:
    values, others = (OP.bind(s.args, s.kwargs) for s in (SAMPLE, beside(SAMPLE, 1)))
    changed = 0
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        assert others[name].dtype == value.dtype
        torch.testing.assert_close(others[name], value, rtol=2**-6, atol=0, equal_nan=True)
        changed += not torch.equal(others[name].nan_to_num(), value.nan_to_num())
        assert value.is_floating_point() or torch.equal(others[name], value)
    assert changed > 4


def test_the_oracle_is_off_by_no_less_beside_a_call() -> None:
    exact, low = (expected(OP, SAMPLE, dtype) for dtype in (torch.float64, torch.float32))
    wider = expected_beside(OP, SAMPLE, torch.float32)
    own, widest = ((found["ssm_state"] - exact["ssm_state"]).abs().max() for found in (low, wider))
    assert own < widest < 10 * own


@pytest.mark.parametrize("by", [1.0, 1.05])
def test_bugs_are_outside_the_wider_budget(by: float) -> None:
    def front(*args: Any, **kwargs: Any) -> Any:
        found = testing.front_on(OP, "torch")(*args, **kwargs)
        OP.bind(args, kwargs)["ssm_state"].mul_(by)
        return found

    judged = partial(testing.judge, OP, SAMPLE, front, partial(expected_beside, OP, SAMPLE))
    if by == 1.0:
        judged()
    else:
        with pytest.raises(AssertionError, match=r"ssm_state: .* outside the budget"):
            judged()


def test_errors_of_gradients_differ_between_calls_that_are_next_to_each_other() -> None:
    op = mamba_ops.mamba_chunk_scan
    sample = next(s for s in op.backward_op.make_samples("cpu") if s.name == "no softplus")
    slips = list(gradients.slips_next_to(op, gradients.named(op.backward_op, sample)))
    assert len(slips) == gradients.NEXT_TO_IT
    assert max(slips) > 1.5 * min(slips) > 0
