"""The backward pass of selective_scan: gradients, determinism, packing; and that these tests catch bugs."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mamba_ops.ops.selective_scan import backward
from mamba_ops.ops.selective_scan.backward import BackwardArguments
from tests.ops.common.backward import assert_equal, assert_gradcheck, judge
from tests.ops.selective_scan.backward_calls import OPTIONAL, call, calls, packed, row_of
from tests.ops.selective_scan.backward_oracle import selective_scan as oracle

DTYPES = [torch.float32, torch.bfloat16]


def reference(arguments: Any) -> Any:
    return backward.selective_scan_backward(BackwardArguments(**arguments))


@pytest.mark.parametrize("left_out", [None, *OPTIONAL])
def test_gradcheck(left_out: str | None) -> None:
    arguments = call(1, 18, dim=2, dstate=2)
    if left_out != "grad_final_states":  # gradcheck asks for the gradients of all results
        assert_gradcheck(reference, oracle, {n: None if n == left_out else t for n, t in arguments.items()})
    else:
        judge(reference, oracle, {**arguments, left_out: None})


def test_gradcheck_packed() -> None:
    assert_gradcheck(reference, oracle, call(20, dim=2, dstate=1, groups=None, **packed(2, 2, 19)))


def judge_all(run: Callable[[Any], Any], dtype: torch.dtype) -> None:
    for arguments in calls(dtype):
        judge(run, oracle, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype: torch.dtype) -> None:
    judge_all(reference, dtype)


def check_rows(run: Callable[[Any], Any]) -> None:
    """Rows alone, and twice, have the same gradients bit for bit; tokens of no row have none."""
    arguments = call(83, dim=34, groups=2, **packed(37, 37, 40, 77))
    together = run(arguments)
    assert_equal(together, run(arguments))
    last = int(arguments["cu_seqlens"][-1])
    for name in ("x", "dt", "B", "C", "z"):
        gradient = getattr(together, name)
        assert gradient[:last].count_nonzero() > 0
        assert gradient[last:].count_nonzero() == 0
    for row in range(4):
        low, high = (int(end) for end in arguments["cu_seqlens"][row : row + 2])
        alone = run(row_of(arguments, row))
        for name in ("x", "dt", "B", "C", "z"):
            assert torch.equal(getattr(together, name)[low:high], getattr(alone, name)), (row, name)
        assert torch.equal(together.initial_states[row], alone.initial_states[0])


def check_halves(run: Callable[[Any], Any]) -> None:
    """The gradient of the second half's initial state, given to the first half, makes the gradients of the whole."""
    whole = {**call(2, 27), "grad_output": call(2, 27)["x"].flip(1)}
    at = 11
    tokens = ("x", "dt", "B", "C", "z", "grad_output")
    _, between = oracle(**{n: t[:, :at] if n in tokens else t for n, t in whole.items() if not n.startswith("grad_")})
    second = run({**{n: t[:, at:] if n in tokens else t for n, t in whole.items()}, "initial_states": between})
    first = {n: t[:, :at] if n in tokens else t for n, t in whole.items()}
    first = run({**first, "grad_final_states": second.initial_states})
    together = run(whole)
    for name in ("x", "dt", "B", "C", "z"):
        halves = torch.cat([getattr(first, name), getattr(second, name)], 1)
        torch.testing.assert_close(halves, getattr(together, name))
    for name in ("A", "D", "dt_bias"):
        torch.testing.assert_close(getattr(first, name) + getattr(second, name), getattr(together, name))
    torch.testing.assert_close(first.initial_states, together.initial_states)


def test_rows_of_the_reference() -> None:
    check_rows(reference)


def test_halves_of_the_reference() -> None:
    check_halves(reference)


def test_no_tokens() -> None:
    for arguments in (call(2, 0), call(0, **packed(0, 0))):
        gradients = reference(arguments)
        assert torch.equal(gradients.initial_states, arguments["grad_final_states"])
        assert gradients.A.count_nonzero() == 0
        assert gradients.B.shape == arguments["B"].shape


BUGS = {
    "final gradient dropped": ("state_gradient = call.grad_final_states.to(compute)", "pass"),
    "pieces not joined": ("store_rows(grad_ended, piece, state_gradient, exists)", "pass"),
    "gradient not decayed": ("after = state_gradient * through[piece]", "after = state_gradient"),
    "groups mixed": (
        "* per_group(grad_state)).sum(2)",
        "* per_group(grad_state)).sum((1, 2), keepdim=True).squeeze(2)",
    ),
    "C of the state before": ("per_group(kept[t] + outer(u[t], b[t]))).sum(2)", "per_group(kept[t])).sum(2)"),
    "softplus not differentiated": ("grad_d / (1 + torch.exp(-raw))", "grad_d"),
    "softplus differentiated above 20": ("torch.where(raw > 20, grad_d,", "torch.where(raw > 20, grad_d * 0,"),
    "gate's own gradient": ("(sigmoid * (1 + gate * (1 - sigmoid)))", "sigmoid"),
    "D dropped": ("grad_x + call.D.to(compute) * grad_gated", "grad_x"),
    "tokens of no row": ("grad_d = torch.where(layout.inside.t().unsqueeze(2), grad_d, 0)", "pass"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug: str) -> None:
    source = inspect.getsource(backward)
    right, wrong = BUGS[bug]
    assert right in source
    scope: dict[str, Any] = {"__name__": backward.__name__}
    exec(compile(source.replace(right, wrong), "mutant.py", "exec"), scope)
    run = scope["selective_scan_backward"]
    with pytest.raises(AssertionError, match="outside the budget"):
        judge_all(lambda arguments: run(BackwardArguments(**arguments)), torch.float32)
