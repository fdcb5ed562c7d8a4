"""What the gradients of a call are: autograd through the op's sequential oracle."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import Op, Sample, use_backend
from mamba_ops.testing.judge import assert_within_budget
from tests.harness import OPS, operands_of, oracle_of, shifted

TRAINED = [op for op in OPS if op.backward_op is not None]
STATES = {"causal_conv1d": "conv_state"}
"""Op to the name of its cache, where that is not `ssm_state`."""


def named(op: Op[...], sample: Sample) -> dict[str, Any]:
    """The arguments of a call of one of an op's companions, by name."""
    return dict(zip((p.name for p in op._called), sample.args, strict=True))


def activation(call: dict[str, Any]) -> Tensor:
    """The input that the output is like."""
    like: Tensor = call["x" if "x" in call else "v"]
    return like


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def oracle_forward(op: Op[...], call: dict[str, Any], dtype: torch.dtype, **roundings: Any) -> tuple[Tensor, Tensor]:
    """The output and the final states of a call, by the op's sequential oracle; `call` has the forward's inputs.

    `roundings`: what the oracle is told of them, where it computes in float32.
    """
    inputs = {name: value for name, value in call.items() if name != "initial_states"}
    states = op.forward_states_op.allocate(**call)[op.forward_states_op.returns.index("final_states")]
    start = call["initial_states"] if call["initial_states"] is not None else torch.zeros_like(states, dtype=dtype)
    known = torch.ones(start.shape[0], dtype=torch.bool)
    oracle, extra = oracle_of(op), {}
    if dtype == torch.float32:
        known_to_it = inspect.signature(oracle).parameters
        extra = {name: value for name, value in roundings.items() if name in known_to_it}
    inputs |= {STATES.get(op.name, "ssm_state"): start, "has_initial_state": known}
    output, final, *_ = oracle(**inputs, out=torch.zeros_like(activation(call)), dtype=dtype, **extra)
    return output, torch.zeros_like(states) if final is None else final


def expected(
    op: Op[...],
    call: dict[str, Any],
    dtype: torch.dtype,
    *,
    operands: torch.dtype | None = None,
    rounds_more: bool = False,
) -> dict[str, Tensor]:
    """The gradients of a call of the backward op, computed in `dtype`; empty for inputs that are None.

    `operands`: what a kernel rounds to, where that is not the dtype of the call. `rounds_more`: in float32 with those
    roundings that a kernel may leave out, if the oracle knows any.
    """
    operands = operands or operands_of(call)
    call = {
        n: v.detach().to("cpu", dtype if is_float(v) else v.dtype) if isinstance(v, Tensor) else v
        for n, v in call.items()
    }
    leaves = {n: v.requires_grad_() for n, v in call.items() if is_float(v) and not n.startswith("grad_")}
    inputs = {p.name: call[p.name] for p in op.forward_op._called}
    output, final = oracle_forward(op, inputs, dtype, operands=operands, rounds_more=rounds_more)
    loss = (output * call["grad_output"]).sum()
    if call["grad_final_states"] is not None:
        loss = loss + (final * call["grad_final_states"]).sum()
    loss = loss + 0 * sum(leaf.sum() for leaf in leaves.values())  # an input of no effect has a gradient too
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return {n: grads.get(n.removeprefix("grad_"), torch.empty(0, dtype=dtype)) for n in op.backward_op.returns}


def gradients(op: Op[...], sample: Sample, backend: str) -> dict[str, Tensor]:
    """What the backward op returns for a sample of it."""
    with torch.no_grad(), use_backend(backend):
        return dict(zip(op.backward_op.returns, op.backward_op(*sample.args), strict=True))


def judge(op: Op[...], sample: Sample, backend: str) -> None:
    """Raise AssertionError unless a backend's gradients are within the budget, and inputs are as before.

    In a sum over tokens that nearly cancel, what the roundings of one call are off by says little about those of
    another: five such calls differ by a factor of twenty. So where the oracle's error in this call is not enough, it is
    the largest that it makes in some calls next to this one, too, which are as hard.
    """
    mine = sample.clone()
    found = gradients(op, mine, backend)
    for before, after in zip(sample.args, mine.args, strict=True):
        if isinstance(before, Tensor):
            assert torch.equal(before.nan_to_num(), after.nan_to_num())
    call = named(op.backward_op, sample)
    exact, low = (expected(op, call, dtype) for dtype in (torch.float64, torch.float32))
    assert {name: gradient.shape for name, gradient in found.items()} == {n: g.shape for n, g in exact.items()}
    what, slip = f"{op.name}, {sample.name}", slip_of(exact, low)
    try:
        assert_gradients(found, exact, slip, what)
    except AssertionError:
        assert_gradients(found, exact, max(slip, *slips_next_to(op, call)), what)


NEXT_TO_IT = 6
"""Calls that are looked at beside one."""


def slips_next_to(op: Op[...], call: dict[str, Any]) -> Iterator[float]:
    """The oracle's own errors in calls whose inputs differ from those of `call` by less than a bfloat16's last bit."""
    operands = operands_of(call)
    for seed in range(NEXT_TO_IT):
        generator = torch.Generator().manual_seed(seed)
        other = dict(call)
        for name, value in call.items():
            if is_float(value):
                other[name] = shifted(value, generator, 2**-8).float()
        exact = expected(op, other, torch.float64)
        yield slip_of(exact, expected(op, other, torch.float32, operands=operands, rounds_more=seed % 2 == 1))


def slip_of(exact: dict[str, Tensor], low: dict[str, Tensor]) -> float:
    """The largest error that the oracle makes in any gradient of a call, relative to the largest number of that
    gradient: one of a few numbers, each a sum over all tokens, can be right by chance."""
    largest = {name: truth.abs().max() for name, truth in exact.items() if truth.numel() > 0}
    slips = (float((low[n].double() - exact[n]).abs().max() / size) for n, size in largest.items() if size)
    slip = max(slips, default=0.0)
    assert slip < 0.1, "the oracle in the kernels' precision is far from the truth"
    return slip


def assert_gradients(
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    slip: float,
    what: str,
    steps: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise AssertionError unless gradients are within the budget of kernels, given those of the oracle in float64 and
    its own relative error. `steps`: how far apart neighbours are in those that are not stored in a float dtype, as in
    `error_budget`.
    """
    for name, actual in found.items():
        if actual.numel() > 0:
            shifted = exact[name] + slip * exact[name].abs().max()
            step = None if steps is None else steps.get(name)
            assert_within_budget(actual.cpu(), exact[name], shifted, f"{what}: {name}", step=step)
