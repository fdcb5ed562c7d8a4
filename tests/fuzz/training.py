"""What is called for gradients: ops, their forwards and backwards, functional entries, layers, compat functions."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops import functional, registry
from mamba_ops.registry import Op, Sample
from tests.fuzz.mutations import Arguments, Tagged
from tests.fuzz.targets import INSIDE, Judge, Results, Target, compat_calls, in_dtype, layers, on
from tests.harness import backends_here, operands_of
from tests.training import gradients
from tests.training.gradients import TRAINED, is_float, oracle_forward

CPU = torch.device("cpu")


def targets(backend: str) -> Iterator[Target]:
    """Everything that records gradients, on a backend."""
    for op in TRAINED:
        if backend in backends_here(op.backward_op, CPU):
            yield from _companions(op, backend)
            yield from _differentiated(op, backend)
    yield from _layers(backend)
    yield from _compat(backend)


def with_gradients(call: Callable[..., Any], written: frozenset[str] = frozenset()) -> Callable[..., Any]:
    """Return a function that makes a call and returns its results, then the gradients of its floating-point tensors."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        leaves: dict[str, Tensor | None] = {}
        given = dict(arguments)
        for name, value in arguments.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or name in written:
                continue
            leaves[name] = None
            is_ordinary = type(value) in (Tensor, torch.nn.Parameter, Tagged)
            if is_ordinary and not value.is_inference() and value.layout is torch.strided:  # others are no leaves
                leaves[name] = given[name] = value.detach().requires_grad_()
        with torch.enable_grad():
            returned = call(**given)
            results = [t for t in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(t, Tensor)]
            recorded = [t for t in results if t.requires_grad]
            cotangents = [cotangent(t) for t in recorded]
            wanted = [leaf for leaf in leaves.values() if leaf is not None]
            # What is no leaf has a place, too, and no numbers there: the truth is computed of leaves alone.
            nothing = torch.empty(0, dtype=torch.int8)
            found = iter([nothing] * len(wanted))
            if recorded and wanted:
                options = {"allow_unused": True, "materialize_grads": True}
                found = iter(torch.autograd.grad(recorded, wanted, cotangents, **options))
        return (*(t.detach() for t in results), *(nothing if leaf is None else next(found) for leaf in leaves.values()))

    return run


def cotangent(like: Tensor) -> Tensor:
    """Gradients of a result: any numbers, which its shape alone decides, and every dtype has."""
    numbers = torch.arange(like.numel()).mul(7).remainder(17).sub(8)
    return (numbers / 8).view(like.shape).to(like)


def judge(found: Results, exact: Results, low: Results, steps: Results, least: int = 16) -> None:
    """Compare the results of one call, where the truth's own error in float32 is never taken for less than `least`
    roundings of the largest number: kernels have other exponentials.

    Nothing is claimed of a call whose results float32 has no bit of. `steps`: how far apart neighbours are in results
    that are stored in a format of their own.
    """
    few = least * torch.finfo(torch.float32).eps
    low = {n: t + few * exact[n].abs().max() if t.numel() else t for n, t in low.items()}
    if any(float((low[n] - t).abs().max()) > 0.05 * float(t.abs().max()) > 0 for n, t in exact.items() if t.numel()):
        return
    gradients.assert_gradients(found, exact, gradients.slip_of(exact, low), "results", steps)


# -- ops, by their oracles --------------------------------------------------------------------------------------------


def _companions(op: Op[...], backend: str) -> Iterator[Target]:
    for companion in op.companions:
        truth = _backward_truth if companion is op.backward_op else _forward_truth
        bases = _bases(companion, backend)
        is_backward = companion is op.backward_op
        found = functools.partial(truth, op, companion)
        target = Target(companion.name, on(backend, companion), bases, found, inside=INSIDE, has_oracle=True)
        yield target._replace(judge=judge if is_backward else None, returns_gradients=is_backward)


def _bases(op: Op[...], backend: str) -> list[Callable[[], Arguments]]:
    """The samples over which the oracles' autograd, which goes token by token, is quick, as are interpreted kernels."""

    def made(sample: Sample) -> Arguments:
        return dict(zip((p.name for p in op._called), sample.clone().args, strict=True))

    def size(sample: Sample) -> int:
        return sum(a.numel() for a in sample.args if isinstance(a, Tensor))

    samples = op.make_samples("cpu")
    short = [s for s in samples if size(s) < (20_000 if backend == "torch" else 4_000)]
    return [functools.partial(made, sample) for sample in short or sorted(samples, key=size)[:2]]


def _converted(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {n: v.detach().to(dtype, copy=True) if is_float(v) else v for n, v in arguments.items()}


def _forward_truth(op: Op[...], companion: Op[...], arguments: Arguments, dtype: torch.dtype) -> Results:
    found = oracle_forward(op, _converted(arguments, dtype), dtype, operands=operands_of(arguments))
    return {f"result {i}": found[("output", "final_states").index(n)] for i, n in enumerate(companion.returns)}


def _backward_truth(op: Op[...], companion: Op[...], arguments: Arguments, dtype: torch.dtype) -> Results:
    with torch.enable_grad():
        found = gradients.expected(op, arguments, dtype)
    return {f"result {i}": found[name] for i, name in enumerate(companion.returns)}


def _differentiated(op: Op[...], backend: str) -> Iterator[Target]:
    """The op itself and its functional entry, each with the gradients of what it returns."""
    states = _bases(op.forward_states_op, backend)
    without = [functools.partial(lambda make: {**make(), "initial_states": None}, make) for make in states]

    def own(initial_states: Tensor | None = None, **arguments: Any) -> Any:
        if initial_states is not None:  # which the op itself does not take
            return op.forward_op(**arguments, initial_states=initial_states)
        return op(**arguments)

    for function, bases in ((own, without), (getattr(functional, op.name), states)):
        truth = functools.partial(_differentiated_truth, op, 1 if function is own else 2)
        run = on(backend, with_gradients(function))
        target = Target(op.name, run, bases, truth, inside=INSIDE, has_oracle=True, judge=judge)
        yield target._replace(records=True, returns_gradients=True)


def _differentiated_truth(op: Op[...], results: int, arguments: Arguments, dtype: torch.dtype) -> Results:
    operands = operands_of(arguments)

    def oracle(**call: Any) -> Any:
        return oracle_forward(op, call, dtype, operands=operands)[:results]

    found = with_gradients(oracle)(**_converted(arguments, dtype))
    return {f"result {i}": value for i, value in enumerate(found)}


# -- layers and other libraries' functions, by themselves in float64 --------------------------------------------------


def _judge_of(backend: str) -> Judge:
    """The backend torch is its own truth in float32, and errs alike but for the layouts of its operands."""
    return functools.partial(judge, least=0) if backend == "torch" else judge


def _layers(backend: str) -> Iterator[Target]:
    for layer in layers():
        layer.requires_grad_(True)

        def call(layer: Any = layer, **arguments: Any) -> Any:
            returned = with_gradients(layer)(**arguments)
            output = layer(**{**arguments, "hidden_states": arguments["hidden_states"].detach()})
            return (*returned, *torch.autograd.grad(output, [*layer.parameters()], cotangent(output)))

        mine = copy.deepcopy(layer)

        def truth(arguments: Arguments, dtype: torch.dtype, call: Any = call, mine: Any = mine) -> Results:
            with torch.enable_grad():
                return in_dtype(functools.partial(call, layer=mine.to(dtype)), arguments, dtype)

        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, 5, 16, generator=generator)
        packed = {"hidden_states": hidden.view(10, 16), "cu_seqlens": torch.tensor([0, 7, 10])}
        bases = [
            functools.partial(copy.deepcopy, {"hidden_states": hidden, **dict.fromkeys(layer.Caches._fields)}),
            functools.partial(copy.deepcopy, packed),
        ]
        target = Target(type(layer).__name__, on(backend, call), bases, truth, inside=INSIDE)
        yield target._replace(judge=_judge_of(backend), records=True, returns_gradients=True)


DIFFERENTIABLE = {
    "mamba_ops.compat.causal_conv1d": ("causal_conv1d_fn",),
    "mamba_ops.compat.fla.delta_rule": ("chunk_gated_delta_rule",),
    "mamba_ops.compat.fla.kda": ("chunk_kda",),
    "mamba_ops.compat.fla.norms": ("l2norm",),
    "mamba_ops.compat.mamba_ssm.parts": ("mamba_inner_fn",),
    "mamba_ops.compat.mamba_ssm.scans": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    "mamba_ops.compat.mamba_ssm.selective_scan": ("selective_scan_fn",),
}
"""Functions of other libraries with gradients of all floating-point tensors that they are given."""


def _compat(backend: str) -> Iterator[Target]:
    for function, base, written in compat_calls():
        if function.__name__ not in DIFFERENTIABLE.get(function.__module__, ()):
            continue
        call = with_gradients(function, written)
        truth = functools.partial(in_dtype, call)
        target = Target(function.__name__, on(backend, call), [base], truth, written, inside=INSIDE)
        yield target._replace(judge=_judge_of(backend), records=True, returns_gradients=True)


def functions() -> list[str]:
    """Names of what records gradients, for the test that nothing is forgotten."""
    return [op.name for op in registry.ops().values() if op.record is not None or op.backward_op is not None]
