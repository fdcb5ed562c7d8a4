"""The backward pass of selective_scan: gradients, determinism, packing; and that these tests catch bugs."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_ops.ops.selective_scan import reference_backward, selective_scan
from mamba_ops.ops.selective_scan.training import BackwardArguments
from tests.conftest import ACCELERATOR
from tests.ops.selective_scan.backward_calls import OPTIONAL, TOKENS, call, calls
from tests.test_mutants import changed, load, source_of
from tests.training.backward import (
    Backward,
    assert_gradcheck,
    caught,
    check_halves,
    check_no_tokens,
    check_rows,
    front_of,
    judge,
    mutant_of,
    oracle_by_name,
    packed,
)

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]


oracle = oracle_by_name(selective_scan)
reference = front_of(reference_backward.selective_scan_backward, BackwardArguments)


@pytest.mark.parametrize("left_out", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONAL)])
def test_gradcheck(left_out: str | None) -> None:
    arguments = call(1, 18, dim=2, dstate=2)
    if left_out != "grad_final_states":  # gradcheck asks for the gradients of all results
        assert_gradcheck(reference, oracle, {n: None if n == left_out else t for n, t in arguments.items()})
    else:
        judge(reference, oracle, {**arguments, left_out: None})


def test_gradcheck_packed() -> None:
    assert_gradcheck(reference, oracle, call(20, dim=2, dstate=1, groups=None, **packed(2, 2, 19)))


@pytest.fixture
def kernel() -> Backward:
    """The Triton kernels."""
    pytest.importorskip("triton")
    module = importlib.import_module("mamba_ops.ops.selective_scan.triton.backward")
    return front_of(module.selective_scan_backward, BackwardArguments)


def judge_all(run: Backward, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    for arguments in calls(dtype, device):
        judge(run, oracle, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype: torch.dtype) -> None:
    judge_all(reference, dtype)


def check_rate_of_minus_infinity(run: Backward, device: torch.device | str = "cpu") -> None:
    """States that forget all at every step, steps of 0 excepted: no gradient is NaN, and none passes a step."""
    arguments = call(1, 11, dim=3, dstate=2, groups=None, device=device, dt_bias=None, dt_softplus=False)
    arguments["A"][:] = -torch.inf
    arguments["dt"] = arguments["dt"].abs()
    arguments["dt"][:, 3:5] = 0
    gradients = run(arguments)
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
    assert gradients["A"].count_nonzero() == 0
    assert gradients["initial_states"].count_nonzero() == 0
    arguments["dt"][:] = 0
    gradients = run(arguments)
    assert gradients["initial_states"].count_nonzero() == gradients["initial_states"].numel()


def test_rate_of_minus_infinity_in_the_reference() -> None:
    check_rate_of_minus_infinity(reference)


def test_rate_of_minus_infinity_in_the_kernel(kernel: Backward, device: torch.device) -> None:
    check_rate_of_minus_infinity(kernel, device)


def rows_call(device: torch.device | str = "cpu") -> dict[str, Any]:
    return call(83, dim=4, dstate=1, device=device, **packed(70, 70, 73, 77, device=device))


def test_rows_of_the_reference() -> None:
    check_rows(reference, rows_call(), TOKENS)


def test_halves_of_the_reference() -> None:
    check_halves(reference, oracle, call(2, 27), TOKENS, 11)


@pytest.mark.parametrize(("lead", "rows"), [((2, 0), {}), ((0,), packed(0, 0))], ids=["dense", "packed"])
def test_no_tokens(kernel: Backward, device: torch.device, lead: tuple[int, ...], rows: dict[str, Any]) -> None:
    check_no_tokens(reference, call(*lead, **rows), TOKENS)
    check_no_tokens(kernel, call(*lead, device=device, **rows), TOKENS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel(kernel: Backward, device: torch.device, dtype: torch.dtype) -> None:
    """On a CPU, interpreted, two calls alone: groups of two blocks of channels, and a row of two chunks."""
    if ACCELERATOR is not None:
        judge_all(kernel, dtype, device)
        return
    judge(kernel, oracle, call(1, 11, dim=132, dtype=dtype))
    judge(kernel, oracle, call(75, dim=3, dstate=2, groups=None, z=None, dtype=dtype, **packed(67, 67, 70)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_on_all_calls(kernel: Backward, device: torch.device, dtype: torch.dtype) -> None:
    judge_all(kernel, dtype, device)


@pytest.mark.slow
def test_rows_of_the_kernel(kernel: Backward, device: torch.device) -> None:
    check_rows(kernel, rows_call(device), TOKENS)


BUGS = {
    "final gradient dropped": ("state_gradient = call.grad_final_states.to(compute)", "pass"),
    "pieces not joined": ("grad_ended = grad_ended + before(grad_begun, from_end <= 0).flip(0)", "pass"),
    "gradient not decayed": ("gained + through * grad_ended", "gained + grad_ended"),
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
    scope = mutant_of(reference_backward, BUGS[bug])
    mutant = front_of(scope["selective_scan_backward"], BackwardArguments)
    assert caught(mutant, oracle, calls(torch.float32))


KERNEL_BUGS = {
    "chunks not joined": ("carried = carried * tl.exp2(rate * total) + added", "carried = added"),
    "final gradient dropped": ("        if grad_final_states is not None:", "        if False:"),
    "groups mixed": ("group = program // BLOCKS % GROUPS", "group = program // BLOCKS % GROUPS * 0"),
    "softplus not differentiated": ("grad_step *= sigmoid(raw, BITS)", "pass"),
    "tokens of no row": ("grad_step = tl.where(there, grad_step, 0.0)", "pass"),
    "tiles not joined": ("tl.store(of_adjoint, grad_s, in_dim)", "pass"),
    "tiles begin as the chunk": ("tl.exp2(rate * total) + next_gained", "tl.exp2(rate * total)"),
    "the next entry's state": ("of_state += DIM", "pass"),
    "the last tile's A": ("earlier + grad_rate", "grad_rate"),
    "one block of channels": ("(start + more < BLOCKS)", "(start + more < 1)"),
    "halves mixed": ("& APART == 0", "& APART != 0"),
    "the wrong halves exchanged": ("[16 // APART, 2, APART]", "[APART, 2, 16 // APART]"),
    "C of the state before": ("_across(pulled[t] * s, BLOCK)", "_across(pulled[t] * before[t], BLOCK)"),
}


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=pytest.mark.slow if number else ()) for number, bug in enumerate(KERNEL_BUGS)]
)
def test_bug_planted_in_the_kernel_is_caught(bug: str, device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    module = load(tmp_path / "mutant_selective_scan.py", changed(source_of(selective_scan), KERNEL_BUGS[bug]))
    mutant = front_of(module.selective_scan_backward, BackwardArguments)
    assert caught(mutant, oracle, (call(1, 11, dim=132, device=device), call(1, 67, dim=3, groups=None, device=device)))
