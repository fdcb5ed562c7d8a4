"""`check_op`: the whole suite of an op, from its samples, call patterns and wrong calls."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import Op, Sample, ops, use_backend
from mamba_ops.testing import compiled, judge

NUMBERS = "numbers are right"
WRITTEN = "the output is written"
UNTOUCHED = "nothing else is touched"
OPCHECK = "torch.library.opcheck"
COMPILED = "compiled equals eager, one graph"
SIZES = "one graph for all sizes"
COPIES = "no copies in Inductor's code"
ERRORS = "wrong calls are refused, untouched"

_CHECKS = {
    NUMBERS: "each call on each backend",
    WRITTEN: "each call on each backend",
    UNTOUCHED: "each call on each backend",
    OPCHECK: "each call on each backend",
    COMPILED: "each call, on all backends in one graph",
    SIZES: "each call pattern; the op has none, add them with @op.call_patterns",
    COPIES: "each call pattern, or the first sample",
    ERRORS: "each wrong call on each backend; the op has none, add them with @op.error_inputs",
}
"""Each check, and what it counts."""


@dataclass
class Checked:
    """What `check_op` ran. As text it is a table, which says of a check that did not run what it needs.

    Attributes:
        op: qualified name.
        device: where.
        backends: names of the backends that ran.
        counts: check to how many times it ran.
        refused: backend to sample to the sentence in which the backend refuses it.
    """

    op: str
    device: torch.device
    backends: Sequence[str]
    counts: Counter[str] = field(default_factory=Counter)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device.type}: {', '.join(self.backends)}"]
        for check, what in _CHECKS.items():
            count = self.counts[check]
            lines.append(f"  {count:4} {check}" + ("" if count else f" ({what})"))
        lines += [f"  {name} refused {len(samples)}: {', '.join(samples)}" for name, samples in self.refused.items()]
        return "\n".join(lines)

    @contextmanager
    def running(self, check: str, where: str) -> Iterator[None]:
        """Count a check when the block ends well; say what failed, and where, when it does not."""
        try:
            yield
        except Exception as error:  # whatever a kernel or the compiler raises is what the check found
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f"{self.op} on {where}: {check}: {kind}{error}") from error
        self.counts[check] += 1


@torch.no_grad()
def check_op(
    op: Op[...],
    oracle: judge.Oracle | None = None,
    *,
    device: torch.device | str = "cpu",
    backends: Sequence[str] | None = None,
    **sizes: Any,
) -> Checked:
    """Hold an op, of any package, to its contract, on each backend that has a kernel for it here.

    For each backend and each of the op's samples: the numbers, an output that was NaN before and is written whole,
    inputs that keep their bits, and `torch.library.opcheck`. For each sample: compiled by Inductor it is one graph on
    all backends, with the bits of the eager call. For each call pattern: one graph for all sizes, and no copies. For
    each wrong call: the sentence, eager and compiled, and no tensor changed. Companions of ops that record gradients
    (`op.forward_op`, `op.forward_states_op`, `op.backward_op`) are ops too; `op` alone does not stand for them.

    Numbers are held to the oracle's in float64. A kernel's error may be twice what the oracle makes in float32, plus
    one rounding. Without an oracle the reference in float64 is the truth, for all backends and for the reference in
    the samples' dtypes; samples whose dtypes cannot be float64 are held to what the reference makes of them, with the
    tolerances of `torch.testing.assert_close`. Then a wrong reference is not noticed, and an op that leaves part of
    its output alone fails.

    Compiled code is forgotten (`torch._dynamo.reset`). Under `TRITON_INTERPRET=1` the backend triton runs on a CPU.

    Args:
        op: the op.
        oracle: called with a sample's arguments (on the CPU, floating tensors in float64 or float32) and `dtype`, in
            which it computes. It returns the output and what each other mutated argument becomes, as new tensors in
            the order of the signature (of a companion what that returns); where the op leaves the output alone it
            returns what `out` held.
        device: where the samples are made.
        backends: their names. None: all that run the op on the device.
        sizes: static sizes and dtypes for the op's samples; its call patterns get the sizes too.

    Returns:
        How often each check ran, which prints as a table.

    Raises:
        AssertionError: something is wrong; it names op, backend, sample, check and what differs.
        ValueError: nothing would be checked: no samples, no kernel of a backend that was named, or all refused.
    """
    device = torch.device(device)
    samples = op.make_samples(device, **sizes)
    if not samples:
        raise ValueError(f"check_op: {op.qualname} yields no samples on {device}, expected one at least")
    done = Checked(op.qualname, device, _backends(op, device, backends))
    takers = [_check_calls(done, op, sample, oracle) for sample in samples]
    for name in done.backends:
        if not any(name in found for found in takers):
            reason = next(iter(done.refused[name].values()))
            hint = "pass sizes that it takes, or name other backends"
            raise ValueError(f"check_op: {name} refuses all samples of {op.qualname}: {reason}; {hint}")
    for sample, found in zip(samples, takers, strict=True):
        if found:
            with done.running(COMPILED, f"{', '.join(found)}, sample {sample.name!r}"):
                compiled.assert_compiled_equals_eager(op, judge.with_nan_output(op, sample), found)
    _check_patterns(done, op, samples, {n: v for n, v in sizes.items() if isinstance(v, int)})
    _check_errors(done, op, samples)
    return done


def backends_on(op: Op[...], device: torch.device) -> list[str]:
    """Return the backends that run an op on a device if asked for by name; for a composed op those of the ops inside,
    as far as that can be known: of all ops that are not composed.
    """
    if op.composed:
        inside = (backends_on(other, device) for other in ops().values() if not other.composed)
        return sorted(set().union(*inside))
    return [name for name, reason in _reasons(op, device).items() if reason is None]


def _reasons(op: Op[...], device: torch.device) -> dict[str, str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a broken package's backend has a reason, as a missing one's
        return {n: kernel.backend.why_unusable(device.type, by_name=True) for n, kernel in op.kernels.items()}


def _backends(op: Op[...], device: torch.device, named: Sequence[str] | None) -> list[str]:
    found = backends_on(op, device)
    for name in named or ():
        if name not in found:
            reason = _reasons(op, device).get(name) or f"has no kernel for {op.qualname}"
            raise ValueError(f"check_op: backend {name} {reason}; on {device.type} there are {', '.join(found)}")
    if not found or (named is not None and not named):
        raise ValueError(f"check_op: got no backend for {op.qualname} on {device}, expected one at least")
    return found if named is None else list(named)


# -- one call ---------------------------------------------------------------------------------------------------------


def _check_calls(done: Checked, op: Op[...], sample: Sample, oracle: judge.Oracle | None) -> list[str]:
    """Check one sample on every backend; return the backends that take it."""
    before = judge.with_nan_output(op, sample)
    expected = _expected(op, before, oracle)
    takers = []
    for backend in done.backends:
        if (reason := judge.refusal(op, backend, sample)) is not None:
            done.refused.setdefault(backend, {})[sample.name] = reason
            continue
        takers.append(backend)
        where = f"{backend}, sample {sample.name!r}"
        after = before.clone()
        with done.running(UNTOUCHED, where), judge.nan_in_results(op):
            found = judge.run(op, judge.front_on(op, backend), after)
            judge.assert_rest_untouched(op, before, after)
        with done.running(WRITTEN, where):
            judge.assert_written(op, before, after, found, None if oracle is None else expected)
        with done.running(NUMBERS, where):
            if expected is not None:
                judge.assert_numbers(op, before, after, expected, found)
            else:
                reference = judge.run(op, judge.front_on(op, "torch"), before.clone())
                for name, tensor in found.items():
                    torch.testing.assert_close(tensor, reference[name], equal_nan=True)
        with done.running(OPCHECK, where), use_backend(backend):
            compiled.opcheck(op, sample)
    return takers


def _expected(op: Op[...], sample: Sample, oracle: judge.Oracle | None) -> judge.Expected | None:
    """Return what computes a call in another dtype: the oracle, or the reference if it takes float64."""
    if oracle is not None:
        return cache(partial(judge.oracle_results, op, oracle, sample))
    reference = cache(partial(judge.reference_results, op, sample))
    try:
        reference(torch.float64)
    except ValueError:
        return None
    return reference


# -- sizes and copies -------------------------------------------------------------------------------------------------


def _check_patterns(done: Checked, op: Op[...], samples: Sequence[Sample], sizes: Mapping[str, int]) -> None:
    for pattern in op.patterns:
        batches = (*compiled.BATCHES, 1, 0)
        backend = _taker(done, op, [compiled.pattern_call(op, pattern, n, done.device, sizes) for n in batches])
        with done.running(SIZES, f"{backend}, call pattern {pattern!r}"), use_backend(backend):
            compiled.assert_one_graph_for_all_sizes(op, pattern, done.device, sizes=sizes)
    calls = [compiled.pattern_call(op, pattern, compiled.BATCHES[0], done.device, sizes) for pattern in op.patterns]
    for call in calls or samples[:1]:
        backend = _taker(done, op, [call])
        with done.running(COPIES, f"{backend}, call {call.name!r}"), use_backend(backend), compiled.counting_graphs():
            compiled.assert_no_copies(op, torch.compile(compiled.plain_call(op), fullgraph=True), call)


def _taker(done: Checked, op: Op[...], calls: Sequence[Sample]) -> str:
    """Return the first backend that takes all of these calls, or the reference's: graphs are the same on all."""
    takes = (name for name in done.backends if all(judge.refusal(op, name, call) is None for call in calls))
    return next(takes, "torch")


# -- wrong calls ------------------------------------------------------------------------------------------------------


def changed(op: Op[...], sample: Sample, name: str, change: Callable[[Any], Any]) -> Sample:
    """Return a copy of the sample with one argument changed."""
    sample = judge.with_output(op, sample).clone()
    positional = [p.name for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = dict(zip(positional, sample.args, strict=False)) | dict(sample.kwargs)
    arguments[name] = change(arguments.get(name))
    args = tuple(arguments.pop(n) for n in positional[: len(sample.args)])
    return Sample(sample.name, args, arguments)


def assert_untouched(before: Sample, after: Sample) -> None:
    """No tensor of a call changed."""
    old, new = ((*s.args, *s.kwargs.values()) for s in (before, after))
    for number, (was, now) in enumerate(zip(old, new, strict=True)):
        if isinstance(was, Tensor):
            name = [*range(len(before.args)), *before.kwargs][number]
            judge.assert_same_bits(f"argument {name} was written by a call that is refused", now, was)


def _check_errors(done: Checked, op: Op[...], samples: Sequence[Sample]) -> None:
    by_name = {sample.name: sample for sample in samples}
    for case in op.make_error_inputs(done.device):
        if case.sample not in by_name:
            raise ValueError(
                f"check_op: an error input of {op.qualname} changes {case.argument} of the sample {case.sample!r}, "
                f"expected one of {', '.join(by_name)}"
            )
        compiled_call = torch.compile(compiled.plain_call(op), fullgraph=True, backend="aot_eager")
        calls = [(name, judge.front_on(op, name)) for name in done.backends]
        with compiled.counting_graphs():
            for place, call in [*calls, ("the default order, compiled", compiled_call)]:
                with done.running(ERRORS, f"{place}, sample {case.sample!r} with another {case.argument}"):
                    bad = changed(op, by_name[case.sample], case.argument, case.change)
                    _assert_refused(op, call, bad, f"{op.qualname}: {case.error}")


def _assert_refused(op: Op[...], call: judge.Front, bad: Sample, error: str) -> None:
    before, message = bad.clone(), None
    try:
        call(*bad.args, **bad.kwargs)
    except ValueError as raised:
        message = str(raised)
    assert message is not None, f"it ran, expected a ValueError {error!r}"
    assert_untouched(before, bad)
    assert re.match(error, message), f"got the error {message!r}, expected {error!r}"
