"""What the tests of all ops share: the ops here, their backends and samples, and their oracles as the judge."""

import functools
import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import Op, Sample
from mamba_ops.testing import judge as testing
from mamba_ops.testing.judge import Front, oracle_results, refusal, with_output
from mamba_ops.testing.op_checks import backends_on
from tests import fresh
from tests.conftest import ACCELERATOR

OPS = sorted(
    (op for op in registry.ops().values() if op.qualname.startswith("mamba_ops::") and not op.returns),
    key=lambda op: op.name,
)
"""All ops but the companions with which they record gradients, which tests/training is about."""
OPERANDS = ("x", "B", "C", "q", "k", "v", "projected", "projected_qkvz")
"""What matrix units are given, or a mixing op hands from one op to the next, has the dtype of these arguments."""

SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("flashinfer", "selective_state_update"): {"dim": 64, "dstate": 64},
    ("flashinfer", "gated_delta_rule_update"): {"k_dim": 128, "v_dim": 128},
    ("flashinfer", "chunk_gated_delta_rule"): {"k_dim": 128, "v_dim": 128},
    ("flashinfer", "kda_update"): {"k_heads": 4, "k_dim": 64, "v_dim": 64, "state_dtype": torch.bfloat16},
    ("flashinfer", "chunk_kda"): {"k_dim": 128, "v_dim": 128},
}
"""Backend and op to the sizes (and the dtype of states) of samples, where the backend takes only some."""

PARTIAL = ("cpp",)
"""Backends that refuse some calls of an op, whatever the sizes; composed ops are not called on them."""

FATAL = {("flashinfer", "speculative, more tokens than columns")}
"""Backend and sample that ends in an assertion on the device: after it the process can use the device no more."""


def backends_here(op: Op[...], device: torch.device) -> list[str]:
    """Backends that run an op on this device, by name at least (Triton interpreted, on a CPU).

    For a composed op those that run what is inside, whatever its samples.
    """
    limited = {*PARTIAL, *(backend for backend, _ in SIZES)} if op.composed else ()
    return [name for name in backends_on(op, device) if name not in limited]


def truncates(op: Op[...], backend: str, device: torch.device) -> bool:
    """Whether what one op hands to the next inside a composed op is truncated to the activations' dtype, as Triton's
    interpreter does, and not rounded, as hardware does. Only float32 activations can be judged there.
    """
    return op.composed and backend == "triton" and backend not in op.kernels and device.type == "cpu"


def samples_for(op: Op[...], backend: str, device: torch.device) -> list[Sample]:
    """An op's samples for a backend, less those that it refuses; that it does is for the backend's own tests."""
    sizes: dict[str, Any] = {"dtype": torch.float32} if truncates(op, backend, device) else {}
    samples = op.make_samples(device, **sizes, **SIZES.get((backend, op.name), {}))
    if (kernel := op.kernels.get(backend)) is not None and kernel.partial and device.type == "cpu":
        wide = op.make_samples(device, dtype=torch.float32)  # of calls that go to the ops inside: see `truncates`
        samples = [s if own_refusal(op, backend, s) is None else w for s, w in zip(samples, wide, strict=True)]
    if (backend, op.name) not in SIZES and backend not in PARTIAL:
        return samples
    return [s for s in samples if (backend, s.name) not in FATAL and refusal(op, backend, s) is None]


def own_refusal(op: Op[...], backend: str, sample: Sample) -> str | None:
    """Why a backend's kernel of this very op does not take calls like this one, or None."""
    return op.kernels[backend].why_not(op.bind(sample.args, sample.kwargs))


def cases(device: torch.device, slow: Callable[[Op[...], str, Sample], bool] = lambda *_: False) -> list[Any]:
    """Every op x backend x sample on this device, for parametrize; those that are `slow` are not for every day."""
    import pytest  # a benchmark reads this file too, where there may be none

    return [
        pytest.param(
            op,
            backend,
            sample,
            id=f"{op.name}-{backend}-{sample}",
            marks=pytest.mark.slow if slow(op, backend, sample) else (),
        )
        for op in OPS
        for backend in backends_here(op, device)
        for sample in samples_for(op, backend, device)
    ]


def long_interpreted(op: Op[...], backend: str, sample: Sample) -> bool:
    """Whether a call is not for every day where it is made many times: another than an op's first one on Triton's
    interpreter, whose kernels take seconds.
    """
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted and sample.name != first_sample(op)


@functools.cache
def first_sample(op: Op[...]) -> str:
    """The name of the op's first sample."""
    return next(iter(op.sampler(torch.device("cpu")))).name


def oracle_of(op: Op[...]) -> Front:
    """The op's sequential oracle."""
    oracle: Front = getattr(importlib.import_module(f"tests.ops.{op.name}.oracle"), op.name)
    return oracle


def operands_of(call: Mapping[str, Any]) -> torch.dtype:
    """What kernels round to what they give to matrix units, by a call's arguments."""
    return functools.reduce(torch.promote_types, (call[n].dtype for n in OPERANDS if n in call))


def expected(op: Op[...], sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the op's oracle says that a call leaves in the tensors that the op mutates, computed in `dtype`.

    In float32 an oracle that knows how rounds what kernels round on their way (see OPERANDS).

    Some roundings are made by all kernels of an op, as a convolution's result is rounded, and some only by those that
    compute in chunks. What one set of roundings is off by does not bound what a part of the set is: they cancel in some
    numbers. So of an oracle that takes `rounds_more` each number is the one that is farther off, with those roundings
    that a kernel may leave out or without.
    """
    parameters, options = inspect.signature(oracle_of(op)).parameters, {}
    if dtype != torch.float32:
        return _said_by_oracle(op, sample, dtype)
    if "operands" in parameters:
        bound = op.bind(sample.args, sample.kwargs)
        options["operands"] = operands_of(bound)
    found = _said_by_oracle(op, sample, dtype, **options)
    if "rounds_more" not in parameters:
        return found
    exact = expected(op, sample, torch.float64)
    more = _said_by_oracle(op, sample, dtype, **options, rounds_more=True)
    return {n: None if t is None else _farther(t, more[n], exact[n]) for n, t in found.items()}


def _said_by_oracle(op: Op[...], sample: Sample, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """What the oracle returns. It takes most of a test's time, and many tests ask for the same numbers: the latest
    answers are kept, each under all that the oracle is given.
    """
    oracle, values = oracle_of(op), {**op.bind(sample.args, sample.kwargs), "dtype": dtype, **options}
    key = (oracle, *((name, _digest(v) if isinstance(v, Tensor) else v) for name, v in values.items()))
    if key not in _SAID:
        if len(_SAID) >= 500:
            del _SAID[next(iter(_SAID))]
        _SAID[key] = oracle_results(op, functools.partial(oracle, **options), sample, dtype)
    return {name: None if tensor is None else tensor.clone() for name, tensor in _SAID[key].items()}


_SAID: dict[Any, dict[str, Tensor | None]] = {}


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    dense = tensor.detach().cpu().contiguous()
    return tensor.shape, tensor.dtype, hashlib.sha1(dense.view(-1).view(torch.uint8).numpy()).digest()


def _farther(one: Tensor, other: Tensor, exact: Tensor) -> Tensor:
    return torch.where((one - exact).abs() > (other - exact).abs(), one, other)


def judge(op: Op[...], sample: Sample, front: Front) -> None:
    """Run `front` on a copy of a sample; raise AssertionError unless it did what the op's oracle says, no more.

    On a GPU a number next to the middle of two may be rounded to the other one, by which it is a whole step from where
    the oracle has it. A few such steps in one row can be further off than all that the oracle's own add up to in this
    call, though not in most. So there the oracle's error is the largest in some calls beside this one, too.
    """
    sample = with_output(op, sample)
    try:
        testing.judge(op, sample, front, functools.partial(expected, op, sample))
    except AssertionError:
        if ACCELERATOR is None:
            raise
        testing.judge(op, sample, front, functools.partial(expected_beside, op, sample))


BESIDE = 6
"""Calls that are looked at beside one."""


def expected_beside(op: Op[...], sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `expected` says; in float32 off by the most that it is in some calls beside this one, in every number."""
    found = expected(op, sample, dtype)
    if dtype != torch.float32:
        return found
    off = {name: 0.0 for name, tensor in found.items() if tensor is not None and tensor.is_floating_point()}
    for other in (sample, *(beside(sample, seed) for seed in range(BESIDE))):
        exact, low = (expected(op, other, each) for each in (torch.float64, torch.float32))
        for name in off:
            errors = (low[name].double() - exact[name])[torch.isfinite(exact[name])].abs()
            off[name] = max(off[name], float(errors.max()) if len(errors) else 0.0)
    exact = expected(op, sample, torch.float64)
    return {name: exact[name] + off[name] if name in off else tensor for name, tensor in found.items()}


def beside(sample: Sample, seed: int) -> Sample:
    """A call whose floating numbers differ from those of another by up to a bfloat16's last bit."""
    generator = torch.Generator().manual_seed(seed)

    def other(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return shifted(value, generator, 2**-6).to(value) if is_float else value

    return Sample(sample.name, tuple(map(other, sample.args)), {n: other(v) for n, v in sample.kwargs.items()})


def shifted(tensor: Tensor, generator: torch.Generator, spread: float) -> Tensor:
    """The same numbers, on the CPU in float64, each off by a random share of itself, at most half of `spread`."""
    share = torch.rand(tensor.shape, generator=generator, dtype=torch.double) - 0.5
    return tensor.detach().cpu().double() * (1 + spread * share)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Within the block, set environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def compiled_for_a_gpu(code: str, *arguments: object, compiles: bool = True, **variables: str) -> Any:
    """Run code in a process in which Triton compiles for an H100 that is not there; return what it prints, as JSON.

    With `compiles=False` kernels are only asked for: see `tests.compile_only`.
    """
    root = Path(__file__).parents[1]
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"} | {"PYTHONPATH": str(root)}
    code = f"import json, sys\nfrom tests import compile_only\ncompile_only.install({compiles=})\n{code}"
    done = fresh.run(["-c", code, *arguments], cwd=root, env=environment | variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
