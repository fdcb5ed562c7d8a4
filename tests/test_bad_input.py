"""A wrong call: a sentence that names the argument, the same from eager and compiled code, nothing written."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.registry import ErrorInput, Op, Sample
from mamba_ops.testing.op_checks import assert_untouched, changed
from tests.conftest import ACCELERATOR
from tests.harness import OPS

DEVICE = ACCELERATOR or torch.device("cpu")
MIXING = [op for op in OPS if "counts" in {p.name for p in op.parameters}]  # these take a plan
CASES = [
    pytest.param(op, case, id=f"{op.name}-{i}-{case.argument}")
    for op in OPS
    for i, case in enumerate(op.make_error_inputs(DEVICE))
]

WITH_SLOTS = [op for op in OPS if any(p.name == "slots" for p in op.parameters)]
assert WITH_SLOTS


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ten_error_inputs_of_every_op(op: Op[...]) -> None:
    assert len(op.make_error_inputs(DEVICE)) >= 10


@functools.cache
def samples_of(op: Op[...]) -> dict[str, Sample]:
    """An op's samples by name; to be cloned."""
    return {sample.name: sample for sample in op.make_samples(DEVICE)}


def refusal(op: Op[...], case: ErrorInput, call: Callable[..., Any]) -> str:
    """The sentence with which a wrong call is refused; nothing is written by then."""
    bad = changed(op, samples_of(op)[case.sample].clone(), case.argument, case.change)
    before = bad.clone()
    with torch.no_grad(), pytest.raises(ValueError, match=rf"^mamba_ops::{op.name}: {case.error}") as error:
        call(*bad.args, **bad.kwargs)
    assert_untouched(before, bad)
    return str(error.value)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_bad_argument(op: Op[...], case: ErrorInput) -> None:
    refusal(op, case, op)


@pytest.mark.parametrize(("op", "case"), CASES)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_code_refuses_in_the_same_words(op: Op[...], case: ErrorInput) -> None:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert refusal(op, case, compiled) == refusal(op, case, op)


def changes(value: Any) -> list[Any]:
    """What else an argument could be."""
    if isinstance(value, Tensor):
        less = value.flatten(0, 1) if value.dim() > 1 else value[0]
        others = [value.double(), value.int(), value.bool(), value[None], value.transpose(0, -1), less]
        return [*others, *(part for d in range(value.dim()) for part in (value.narrow(d, 0, 0), value.narrow(d, 0, 1)))]
    return [0, -1, 1, 3, float("nan"), -float("inf")] if isinstance(value, int | float) else []


@pytest.mark.parametrize(
    ("op", "sample"),
    [
        pytest.param(op, sample, id=f"{op.name}-{sample}")
        for sample in ("base", "speculative")
        for op in OPS
        if op.composed and (sample == "base" or op in MIXING)
    ],
)
def test_what_ops_inside_would_refuse_a_composed_op_does(op: Op[...], sample: str) -> None:
    """So that nothing is written before a call is refused."""
    [good] = [s for s in op.make_samples("cpu") if s.name == sample]
    said = []
    for name, value in op.bind(good.args, good.kwargs).items():
        for other in changes(value):
            bad = changed(op, good, "out" if name == "output" else name, lambda _, o=other: o)
            with torch.no_grad(), contextlib.suppress(TypeError, RuntimeError):  # of a schema: 0.5 tokens, say
                try:
                    op(*bad.args, **bad.kwargs)
                except ValueError as error:
                    said.append(str(error))
    assert len(said) > 50
    assert [text for text in said if not text.startswith(f"mamba_ops::{op.name}: ")] == []


@pytest.mark.parametrize("op", MIXING, ids=lambda op: op.name)
def test_a_plan_needs_caches_with_a_slot(op: Op[...]) -> None:
    bad = op.make_samples(DEVICE)[0]
    for name in (name for name in op.mutates if name.endswith("_state")):
        bad = changed(op, bad, name, lambda cache: cache[:0])
    with torch.no_grad(), pytest.raises(ValueError, match="_state: got 0 slots, expected 1 at least"):
        op(*bad.args, **bad.kwargs)


def test_groups_divide_heads() -> None:
    [good] = [s for s in mamba_ops.selective_state_update.make_samples(DEVICE) if s.name == "base"]
    state, x, dt, A, B, C = good.args
    with torch.no_grad(), pytest.raises(ValueError, match=r"B: got .*3 groups.* expected .*4 heads"):
        mamba_ops.selective_state_update(state, x, dt, A, *(m.repeat(1, 2, 1)[:, :3] for m in (B, C)), **good.kwargs)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_meta_among_real_tensors(op: Op[...]) -> None:
    bad = changed(op, op.make_samples(DEVICE)[0], op.parameters[2].name, lambda t: t.to("meta"))
    with torch.no_grad(), pytest.raises(ValueError, match=f"{op.parameters[2].name}: got a tensor on meta, expected"):
        op(*bad.args, **bad.kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_two_devices(op: Op[...]) -> None:
    """Also after the same call on one device was remembered."""
    good = op.make_samples(DEVICE)[0]
    copied = good.clone()
    with torch.no_grad():
        op(*copied.args, **copied.kwargs)
        for name in (op.parameters[2].name, "slots"):
            bad = changed(op, good, name, lambda t: t.cpu())
            # one of the two is named: that which is not where the tensor is that all the others are compared with
            with pytest.raises(ValueError, match=r"\w+: got (cpu, expected cuda:0|cuda:0, expected cpu), where \w+ is"):
                op(*bad.args, **bad.kwargs)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_gradients_are_refused_in_eager_and_compiled(op: Op[...]) -> None:
    """Also for a parameter, the usual way to meet this; and under no_grad the same call runs."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)

    good = op.make_samples(DEVICE)[0].clone()
    floats = [i for i, a in enumerate(good.args) if isinstance(a, Tensor) and a.is_floating_point()]
    assert floats
    for number in floats:
        bad = Sample(
            "grad", tuple(torch.nn.Parameter(a) if i == number else a for i, a in enumerate(good.args)), good.kwargs
        )
        before = bad.clone()
        name = op.parameters[number].name
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for call in (op, compiled):
            with pytest.raises(ValueError, match=f"^mamba_ops::{op.name}: {name}: got a tensor that requires grad"):
                call(*bad.args, **bad.kwargs)
        assert_untouched(before, bad)
        with torch.no_grad():
            compiled(*bad.clone().args, **bad.kwargs)
