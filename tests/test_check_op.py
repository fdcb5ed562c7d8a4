"""`mamba_ops.testing.check_op` on a toy op: it passes when it is right, and a planted fault fails the right check."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.registry import Backend, ErrorInput, Namespace, Op, Sample, bad_argument, require_out
from mamba_ops.testing import RandomInputs, check_op
from mamba_ops.testing.op_checks import (
    COMPILED,
    COPIES,
    ERRORS,
    NUMBERS,
    OPCHECK,
    SIZES,
    UNTOUCHED,
    WRITTEN,
)

EVERY_CHECK = {COMPILED, COPIES, ERRORS, NUMBERS, OPCHECK, SIZES, UNTOUCHED, WRITTEN}


def right(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    decay = decay.to(torch.promote_types(x.dtype, torch.float32))
    average = decay * state + (1 - decay) * x
    state.copy_(average)
    output.copy_(scale * average)


def oracle(
    state: Tensor, x: Tensor, decay: Tensor, scale: float = 1.0, *, out: Tensor | None = None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    new = torch.empty_like(state, dtype=dtype)
    for row, i in itertools.product(range(x.shape[0]), range(x.shape[1])):
        new[row, i] = decay[i] * state[row, i] + (1 - decay[i]) * x[row, i]
    return scale * new, new


def check(state: Tensor, x: Tensor, decay: Tensor) -> None:
    if state.shape != x.shape:
        raise bad_argument("state", got=f"shape {tuple(state.shape)}", expected=tuple(x.shape))
    if decay.shape != x.shape[1:]:
        raise bad_argument("decay", got=f"shape {tuple(decay.shape)}", expected=tuple(x.shape[1:]))


def like_x(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


Declare = Callable[..., Op[...]]


@pytest.fixture
def declare() -> Iterator[Declare]:
    """Declares the toy op: a moving average of `x` kept in `state`, and written, scaled, to `out`."""
    namespace = Namespace("checked")

    def declare(
        body: Callable[..., None] = right,
        mutates: tuple[str, ...] = ("state", "out"),
        allocate: Callable[[Tensor], Tensor] = like_x,
        checks: Callable[..., None] | None = check,
        scale_of: Callable[[RandomInputs], float] = lambda random: 0.5,
        patterns: bool = True,
        wrong_calls: bool = True,
    ) -> Op[...]:
        @namespace.op(mutates=mutates)
        def average(
            state: Tensor, x: Tensor, decay: Tensor, scale: float = 1.0, *, out: Tensor | None = None
        ) -> Tensor:
            output = require_out(out)
            body(state, x, decay, scale, output)
            return output

        average.allocate_output(allocate)
        if checks is not None:
            average.validate(checks)

        @average.samples
        def _samples(device: torch.device, *, dtype: torch.dtype = torch.float32, dim: int = 8) -> Iterator[Sample]:
            generator = torch.Generator().manual_seed(0)

            def normal(*shape: int) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            yield Sample("base", (normal(3, dim), normal(3, dim), normal(dim).sigmoid()))
            yield Sample("scaled", (normal(3, dim), normal(3, dim), normal(dim).sigmoid(), 0.5))
            yield Sample("transposed x", (normal(3, dim), normal(dim, 3).t(), normal(dim).sigmoid()))
            yield Sample("out", (normal(3, dim), normal(3, dim), normal(dim).sigmoid()), {"out": normal(dim, 3).t()})

        if patterns:

            @average.call_patterns("rows")
            def _call(random: RandomInputs, pattern: str) -> Sample:
                dim = random.size("dim", 6)
                arguments = random.cache(dim)[: random.rows], random.tokens(dim), -random.weight(dim)
                return Sample(pattern, (*arguments, scale_of(random)))

        if wrong_calls:

            @average.error_inputs
            def _error_inputs(device: torch.device) -> list[ErrorInput]:
                return [ErrorInput("base", "decay", lambda decay: decay[:-1], r"decay: got shape \(7,\), expected")]

        return average

    yield declare
    namespace.remove()


@pytest.fixture
def other() -> Iterator[Backend]:
    """A backend beside the reference."""
    backend = Backend("other", devices=("cpu",))
    yield backend
    backend.remove()


def kernel(change: Callable[..., None]) -> Callable[..., None]:
    """A kernel of the op's signature."""

    def adapter(state: Tensor, x: Tensor, decay: Tensor, scale: float = 1.0, *, output: Tensor) -> None:
        change(state, x, decay, scale, output)

    return adapter


@pytest.mark.parametrize("given", [oracle, None])
def test_a_right_op_passes_every_check(declare: Declare, other: Backend, given: Any) -> None:
    op = declare()
    other.implements(op, kernel(right), unsupported=lambda scale: "takes a scale of 1" if scale != 1 else None)
    done = check_op(op, given)
    assert done.backends == ["torch", "other"]
    assert done.refused == {"other": {"scaled": "takes a scale of 1"}}
    calls = dict.fromkeys((NUMBERS, WRITTEN, UNTOUCHED, OPCHECK), 4 + 3)
    assert done.counts == {**calls, COMPILED: 4, SIZES: 1, COPIES: 1, ERRORS: 3}
    assert done.counts.keys() == EVERY_CHECK
    assert f"   7 {NUMBERS}\n" in str(done)
    assert "  other refused 1: scaled" in str(done)


def test_sizes_reach_the_samples_and_the_call_patterns(declare: Declare) -> None:
    seen = set()

    def body(*args: Any) -> None:
        seen.add((args[1].shape[1], args[1].dtype))
        right(*args)

    check_op(declare(body, wrong_calls=False), oracle, dim=5, dtype=torch.bfloat16)
    assert {dim for dim, _ in seen} == {5}
    assert {dtype for _, dtype in seen} == {torch.bfloat16, torch.float32}  # float32 in the call pattern


def test_a_check_that_did_not_run_says_what_it_needs(declare: Declare) -> None:
    done = check_op(declare(patterns=False, wrong_calls=False), oracle)
    assert done.counts.keys() == EVERY_CHECK - {SIZES, ERRORS}
    assert f"   0 {SIZES} (each call pattern; the op has none, add them with @op.call_patterns)" in str(done)
    assert f"   0 {ERRORS} (" in str(done)


def test_a_backend_may_refuse_the_call_patterns(declare: Declare, other: Backend) -> None:
    """Then they run on the reference."""
    op = declare()
    other.implements(op, kernel(right), unsupported=lambda x: "takes 3 rows" if x.shape[0] != 3 else None)
    done = check_op(op, oracle, backends=["other"])
    assert done.counts[SIZES] == done.counts[COPIES] == 1


# -- faults -----------------------------------------------------------------------------------------------------------


def last_row_not_written(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    full = torch.empty_like(output)
    right(state, x, decay, scale, full)
    output[:-1] = full[:-1]


def wrong_sign(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    right(state, -x, decay, scale, output)


def state_not_advanced(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    right(state.clone(), x, decay, scale, output)


def in_half_precision(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    right(state, x.half().to(x.dtype), decay, scale, output)


def in_the_dtype_of_x(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    average = decay.to(x.dtype) * state + (1 - decay.to(x.dtype)) * x
    state.copy_(average)
    output.copy_(scale * average)


def x_overwritten(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    right(state, x, decay, scale, output)
    x.mul_(2)


def output_resized(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    output.resize_(*x.shape, 1)
    right(state, x, decay, scale, output.squeeze(2))


def raises_when_written(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    state.add_(1)
    if decay.shape != x.shape[1:]:
        raise ValueError(f"checked::average: decay: got shape {tuple(decay.shape)}, expected {tuple(x.shape[1:])}")
    right(state.sub_(1), x, decay, scale, output)


def another_result_each_time(number: Iterator[int]) -> Callable[..., None]:
    def body(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
        right(state, x, decay, scale, output)
        output.mul_(1 + 2.0**-23 * (next(number) % 2))

    return body


def too_wide(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] + 1)


def fills_too_wide(state: Tensor, x: Tensor, decay: Tensor, scale: float, output: Tensor) -> None:
    right(state, x, decay, scale, output[:, : x.shape[1]])
    output[:, x.shape[1] :] = 0


FAULTS = {
    "output not written": ({"body": last_row_not_written}, WRITTEN, "8 of 24 elements of the output"),
    "mutation not declared": ({"mutates": ("out",)}, UNTOUCHED, "state was touched"),
    "input overwritten": ({"body": x_overwritten}, UNTOUCHED, "x was touched"),
    "output resized": ({"body": output_resized}, UNTOUCHED, "output had shape, strides, offset"),
    "wrong numbers": ({"body": wrong_sign}, NUMBERS, "output: 24 of 24 elements outside the budget"),
    "state not advanced": ({"body": state_not_advanced}, NUMBERS, "state: 24 of 24 elements outside the budget"),
    "rounded on the way": ({"body": in_half_precision}, NUMBERS, "elements outside the budget"),
    "output of another shape": (
        {"body": fills_too_wide, "allocate": too_wide},
        NUMBERS,
        r"output: got shape \(3, 9\), expected \(3, 8\)",
    ),
    "changing bits": ({"body": another_result_each_time(itertools.count())}, COMPILED, "output, compiled on torch"),
    "a graph for each length": ({"scale_of": lambda random: 1 / random.length}, SIZES, "2 rows: got graph number 2"),
    "a graph for large batches": (
        {"allocate": lambda x: x.new_empty(x.shape) if x.shape[0] < 8 else torch.empty_like(x)},
        SIZES,
        "rows: got graph number 2",
    ),
    "a copy": ({"allocate": lambda x: x.clone()}, COPIES, "in Inductor's code, expected the op alone"),
    "a bad call half done": ({"body": raises_when_written, "checks": None}, ERRORS, "argument 0 was written by a call"),
    "a bad call not refused": (
        {"body": lambda s, x, d, c, o: right(s, x, torch.cat([d, d])[: x.shape[1]], c, o), "checks": None},
        ERRORS,
        "it ran, expected a ValueError",
    ),
    "another sentence": (
        {"checks": lambda decay: None if decay.shape[0] != 7 else (_ for _ in ()).throw(ValueError("no"))},
        ERRORS,
        r"got the error 'checked::average: no', expected 'checked::average: decay: got shape",
    ),
}


@pytest.mark.parametrize(("fault", "by", "says"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(declare: Declare, fault: dict[str, Any], by: str, says: str) -> None:
    op = declare(**fault)
    with pytest.raises(AssertionError, match=says) as failed:
        check_op(op, oracle)
    assert str(failed.value).startswith("checked::average on t")  # torch, or the default order
    assert f": {by}: " in str(failed.value)


@pytest.mark.parametrize("given", [oracle, None])
@pytest.mark.parametrize(
    ("fault", "by"),
    [(last_row_not_written, WRITTEN), (wrong_sign, NUMBERS), (x_overwritten, UNTOUCHED), (in_half_precision, NUMBERS)],
)
def test_a_fault_of_one_backend_is_its_own(
    declare: Declare, other: Backend, fault: Callable[..., None], by: str, given: Any
) -> None:
    """Without an oracle the reference is the truth."""
    op = declare()
    other.implements(op, kernel(fault))
    with pytest.raises(AssertionError, match=f"^checked::average on other, sample 'base': {by}: "):
        check_op(op, given)
    assert check_op(op, given, backends=["torch"]).backends == ["torch"]


def test_without_an_oracle_the_reference_is_held_to_itself_in_float64(declare: Declare) -> None:
    with pytest.raises(AssertionError, match=f"on torch, sample 'base': {NUMBERS}: "):
        check_op(declare(in_the_dtype_of_x, wrong_calls=False), dtype=torch.bfloat16)


def test_an_op_that_takes_no_float64_is_compared_with_its_reference(declare: Declare, other: Backend) -> None:
    def checks(state: Tensor, x: Tensor, decay: Tensor) -> None:
        check(state, x, decay)
        if x.dtype == torch.float64:
            raise bad_argument("x", got="float64", expected="float32")

    op = declare(checks=checks)
    other.implements(op, kernel(right))
    assert check_op(op).counts[NUMBERS] == 8
    other.remove()
    op.kernels.pop("other", None)
    wrong = Backend("wrong", devices=("cpu",))
    try:
        wrong.implements(op, kernel(wrong_sign))
        with pytest.raises(AssertionError, match=f"on wrong, sample 'base': {NUMBERS}: Tensor-likes are not close"):
            check_op(op)
    finally:
        wrong.remove()


# -- nothing to check -------------------------------------------------------------------------------------------------


def test_an_op_without_samples_is_an_error(declare: Declare) -> None:
    op = declare()
    op.samples(lambda device: [])
    with pytest.raises(ValueError, match="check_op: checked::average yields no samples on cpu, expected one at least"):
        check_op(op, oracle)


def test_a_backend_that_cannot_run_is_an_error(declare: Declare, other: Backend) -> None:
    op = declare()
    with pytest.raises(ValueError, match="backend other has no kernel for checked::average; on cpu there are torch"):
        check_op(op, oracle, backends=["other"])
    other.implements(op, kernel(right), unsupported=lambda: "takes nothing")
    with pytest.raises(ValueError, match="other refuses all samples of checked::average: takes nothing; pass sizes"):
        check_op(op, oracle)
    other.devices = ("cuda",)
    with pytest.raises(ValueError, match="backend other runs on cuda, not on cpu; on cpu there are torch"):
        check_op(op, oracle, backends=["other"])
    with pytest.raises(ValueError, match="got no backend for checked::average on cpu"):
        check_op(op, oracle, backends=[])


def test_an_oracle_that_returns_too_little_is_an_error(declare: Declare) -> None:
    with pytest.raises(AssertionError, match="returned 1 tensors, expected output, state"):
        check_op(declare(), lambda *args, **kwargs: oracle(*args, **kwargs)[0])
