"""How one call of an op is judged: its numbers, what it must write, and what it must leave alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import NoBackendError, Op, Sample, use_backend

Front = Callable[..., Any]
"""What makes a call: the op, or a function of the op's arguments around it."""

Oracle = Callable[..., Tensor | tuple[Tensor, ...]]
"""A function of the op's arguments and of `dtype`, in which it computes: it changes none of them, and returns what the
op leaves in its output and in each other argument that it mutates, in the order of the signature.
"""

Expected = Callable[[torch.dtype], dict[str, Tensor]]
"""What a call leaves in each tensor that the op mutates, by name, computed in a dtype."""


def error_budget(truth: Tensor, low: Tensor, stored: torch.dtype, step: Tensor | None = None) -> Tensor:
    """Return how far, element by element, a kernel may be from the truth.

    Twice the largest error that the oracle itself makes when it computes in the kernel's precision, plus one rounding
    of the stored dtype: the budget comes from the data, no tolerance is set by hand.

    Args:
        truth: the oracle's result in float64.
        low: the oracle's result computed in float32 and rounded as the kernel's is.
        stored: dtype of the kernel's result.
        step: how far apart neighbours are where the result is stored, if that is not in a float dtype.
    """
    finite = torch.isfinite(truth)
    max_error = (low.double() - truth)[finite].abs().max() if finite.any() else torch.zeros((), dtype=torch.float64)
    return 2 * max_error + (torch.finfo(stored).eps * truth.abs() if step is None else step) + torch.finfo(stored).tiny


def assert_within_budget(
    actual: Tensor, truth: Tensor, low: Tensor, what: str = "result", *, step: Tensor | None = None
) -> None:
    """Raise AssertionError, with the worst element, if a kernel's result is outside `error_budget`."""
    assert actual.shape == truth.shape, f"{what}: got shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error = (actual.double() - truth).abs()
    budget = error_budget(truth, low, actual.dtype, step)
    wrong = ~(error <= budget)  # NaN is wrong too
    if wrong.any():
        worst = int((error - budget).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements outside the budget; worst at flat index {worst}: "
            f"got {actual.flatten()[worst].item():.6g}, truth {truth.flatten()[worst].item():.6g}, "
            f"budget {budget.flatten()[worst].item():.3g}"
        )


# -- a call and its results -------------------------------------------------------------------------------------------


def with_output(op: Op[...], sample: Sample) -> Sample:
    """Return the same call with an output to write, full of random numbers: what is not written differs."""
    if op.returns or "output" not in op.mutates or sample.kwargs.get("out") is not None:
        return sample
    out = op.allocate(**{k: v for k, v in op.bind(sample.args, sample.kwargs).items() if k != "output"})
    generator = torch.Generator().manual_seed(1)
    filled = torch.randn(out.shape, generator=generator).to(out)
    return Sample(sample.name, sample.args, {**sample.kwargs, "out": filled})


def with_nan_output(op: Op[...], sample: Sample) -> Sample:
    """Return the same call with NaN in its output (the largest number, where the output holds integers), as far as the
    output is no input too.
    """
    filled = with_output(op, sample).clone()
    out = filled.kwargs.get("out")
    if out is None:
        return filled
    inputs = [v for n, v in op.bind(filled.args, filled.kwargs).items() if n != "output" and isinstance(v, Tensor)]
    if all(_storage(tensor).data_ptr() != _storage(out).data_ptr() for tensor in inputs):
        out.fill_(torch.nan if out.is_floating_point() else True if out.dtype == torch.bool else _largest(out.dtype))
    return filled


@contextmanager
def nan_in_results(op: Op[...]) -> Iterator[None]:
    """Within the block NaN is in new memory of what an op returns, but where its declaration fills that itself."""
    allocate = op.facets["allocate_output"]

    def filled(*args: Any, **kwargs: Any) -> Any:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)  # by which torch fills what it does not initialise
        try:
            return allocate(*args, **kwargs)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    if op.returns:
        op.facets["allocate_output"] = filled
    try:
        yield
    finally:
        op.facets["allocate_output"] = allocate


def _largest(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


def results(op: Op[...], sample: Sample) -> dict[str, Tensor]:
    """Return the tensors of a call that the op mutates, by the op's names, without caches that were left out."""
    arguments = op.bind(sample.args, sample.kwargs)
    return {name: arguments[name] for name in sorted(op.mutates) if arguments[name] is not None}


def run(op: Op[...], front: Front, sample: Sample) -> dict[str, Tensor]:
    """Make a call; return the tensors that the op mutated in it, or returned, by the op's names."""
    returned = front(*sample.args, **sample.kwargs)
    if not op.returns:
        return results(op, sample)
    return dict(zip(op.returns, (returned,) if isinstance(returned, Tensor) else returned, strict=True))


def numbers_meant(op: Op[...], arguments: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Return what tensors that the op mutates stand for, where that is not their own numbers: see `Op.meant`."""
    return op.facets["meant"](**arguments) if "meant" in op.facets else {}


def front_on(op: Op[...], backend: str) -> Front:
    """Return the op's front, with every call on one backend."""

    def front(*args: Any, **kwargs: Any) -> Any:
        with use_backend(backend):
            return op(*args, **kwargs)

    return front


def refusal(op: Op[...], backend: str, sample: Sample) -> str | None:
    """Return why a backend does not take a call, or None. For a composed op: why an op inside it does not."""
    if not op.composed:
        arguments, kernel = op.bind(sample.args, sample.kwargs), op.kernels[backend]
        refusals = [refuse for refuse in (kernel.unsupported, kernel.unsupported_layout) if refuse is not None]
        return next(filter(None, (refuse(**arguments) for refuse in refusals)), None)
    call = with_output(op, sample).clone()
    try:
        front_on(op, backend)(*call.args, **call.kwargs)
    except NoBackendError as error:
        return str(error)
    return None


def oracle_results(op: Op[...], oracle: Oracle, sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the oracle says that a call leaves in the tensors that the op mutates, computed in `dtype`.

    It runs on the CPU, so the error budget is the same on every machine.
    """
    call = sample.to(dtype, "cpu").clone()
    found = oracle(*call.args, **call.kwargs, dtype=dtype)
    found = (found,) if isinstance(found, Tensor) else found
    names = ["output"] * ("output" in op.mutates)
    names += [p.name for p in op.parameters if p.name in op.mutates - {"output"}]
    names = list(op.returns) or names
    if len(found) != len(names):
        raise ValueError(f"the oracle of {op.qualname} returned {len(found)} tensors, expected {', '.join(names)}")
    return dict(zip(names, found, strict=True))


def reference_results(op: Op[...], sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the reference leaves in the tensors that the op mutates, with all floating tensors in `dtype`.

    Raises:
        ValueError: the op does not take these dtypes.
    """
    return run(op, front_on(op, "torch"), sample.to(dtype, "cpu").clone())


# -- what is asserted -------------------------------------------------------------------------------------------------


def judge(op: Op[...], sample: Sample, front: Front, expected: Expected) -> None:
    """Run `front` on a copy of a sample; raise AssertionError unless it did what the op's contract says, no more."""
    after = sample.clone()
    found = run(op, front, after)
    assert_numbers(op, sample, after, expected, found)
    assert_rest_untouched(op, sample, after)


def assert_numbers(op: Op[...], before: Sample, after: Sample, expected: Expected, found: Mapping[str, Tensor]) -> None:
    """What `run` found has the expected numbers, under the error budget; where NaN is expected, it stays NaN."""
    truth, low = (expected(dtype) for dtype in (torch.float64, torch.float32))
    meant = numbers_meant(op, op.bind(after.args, after.kwargs))
    for name, actual in found.items():
        what, actual = f"{op.name}, {before.name}: {name}", actual.cpu()
        if name in meant:
            if (numbers := meant[name]) is not None:
                assert_within_budget(numbers[0].cpu(), truth[name], low[name], what, step=numbers[1].cpu())
            continue
        if not actual.is_floating_point():
            assert torch.equal(actual, truth[name]), f"{what}: got {actual.tolist()}, expected {truth[name].tolist()}"
            continue
        assert actual.shape == truth[name].shape, (
            f"{what}: got shape {tuple(actual.shape)}, expected {tuple(truth[name].shape)}"
        )
        kept = truth[name].isnan() & actual.isnan()
        actual, exact, rounded = (t.masked_fill(kept, 0) for t in (actual, truth[name], low[name]))
        assert_within_budget(actual, exact, rounded, what)


def assert_written(
    op: Op[...], before: Sample, after: Sample, found: Mapping[str, Tensor], expected: Expected | None = None
) -> None:
    """No element of the output, or of what `run` found that the op returned, is left NaN, apart from those that are NaN
    in what is expected too.
    """
    for name in op.returns:
        nan = found[name].isnan().cpu()
        if expected is not None and nan.any():
            nan &= ~expected(torch.float64)[name].isnan()
        assert not nan.any(), f"{int(nan.sum())} of {nan.numel()} elements of {name} are NaN, as before the call"
    if op.returns:
        return
    output, was = (results(op, sample).get("output") for sample in (after, before))
    if output is None or was is None or not was.is_floating_point():
        return
    left = (was.isnan() & output.isnan()).cpu()
    if expected is not None and left.any():
        left &= ~expected(torch.float64)["output"].isnan().broadcast_to(left.shape)
    assert not left.any(), f"{int(left.sum())} of {left.numel()} elements of the output hold what they held before"


def assert_rest_untouched(op: Op[...], before: Sample, after: Sample) -> None:
    """What the op does not mutate, and the padding around what it does, keeps its bits; all keeps shape and strides."""
    old, new = (op.bind(s.args, s.kwargs) for s in (before, after))
    for name, tensor in old.items():
        if not isinstance(tensor, Tensor):
            continue
        what = f"{op.name}, {before.name}: {name}"
        layouts = [(tuple(t.shape), t.stride(), t.storage_offset()) for t in (tensor, new[name])]
        assert layouts[0] == layouts[1], f"{what} had shape, strides, offset {layouts[0]}, and has {layouts[1]} now"
        was, now = (_storage(t) for t in (tensor, new[name]))
        if name in op.mutates:
            inside = torch.zeros(was.shape, dtype=torch.bool, device=was.device)
            inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
            was, now = was[~inside], now[~inside]
        assert torch.equal(was.view(torch.uint8), now.view(torch.uint8)), f"{what} was touched"


def assert_same_bits(what: str, got: Tensor | None, expected: Tensor | None) -> None:
    """Two tensors hold the same numbers, NaN where the other has one, in one dtype and shape; or there are none."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def _storage(tensor: Tensor) -> Tensor:
    """Return all of a tensor's storage, padding included, as one flat tensor."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
