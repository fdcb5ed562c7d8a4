"""How a kernel is judged: every output and every mutated tensor against the oracle, everything else untouched."""

import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import Op, Sample, use_backend
from mamba_ops.registry.samples import assert_within_budget

OPS = sorted(
    (op for op in registry.ops().values() if op.qualname.startswith("mamba_ops::") and not op.returns),
    key=lambda op: op.name,
)
"""All ops but the companions with which they record gradients, which tests/training is about."""
OPERANDS = ("x", "B", "C", "q", "k", "v", "projected", "projected_qkvz")
"""What matrix units are given, or a mixing op hands from one op to the next, has the dtype of these arguments."""

Front = Callable[..., Any]

SIZES: dict[tuple[str, str], dict[str, int]] = {
    ("flashinfer", "selective_state_update"): {"dim": 64, "dstate": 64},
    ("flashinfer", "gated_delta_rule_update"): {"k_dim": 128, "v_dim": 128},
    ("flashinfer", "chunk_gated_delta_rule"): {"k_dim": 128, "v_dim": 128},
}
"""Backend and op to the sizes of samples, where the backend takes only some."""

FATAL = {("flashinfer", "speculative, more tokens than columns")}
"""Backend and sample that ends in an assertion on the device: after it the process can use the device no more."""


def backends_here(op: Op[...], device: torch.device) -> list[str]:
    """Backends that run an op on this device, by name at least (Triton interpreted, on a CPU).

    For a composed op those that run what is inside, whatever its samples.
    """
    if op.composed:
        inside = {name for inside in OPS if not inside.composed for name in backends_here(inside, device)}
        return sorted(inside - {backend for backend, _ in SIZES})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a broken package is no backend here, and no failure of a test
        return [n for n, kernel in op.kernels.items() if kernel.backend.why_unusable(device.type, by_name=True) is None]


def truncates(op: Op[...], backend: str, device: torch.device) -> bool:
    """Whether what one op hands to the next inside a composed op is truncated to the activations' dtype, as Triton's
    interpreter does, and not rounded, as hardware does. Only float32 activations can be judged there.
    """
    return op.composed and backend == "triton" and device.type == "cpu"


def samples_for(op: Op[...], backend: str, device: torch.device) -> list[Sample]:
    """An op's samples for a backend, less those that it refuses; that it does is for the backend's own tests."""
    sizes: dict[str, Any] = {"dtype": torch.float32} if truncates(op, backend, device) else {}
    samples = op.make_samples(device, **sizes, **SIZES.get((backend, op.name), {}))
    if (backend, op.name) not in SIZES:
        return samples
    return [s for s in samples if (backend, s.name) not in FATAL and refusal(op, backend, s) is None]


def refusal(op: Op[...], backend: str, sample: Sample) -> str | None:
    """Why a backend does not take a call, or None."""
    arguments, kernel = op.bind(sample.args, sample.kwargs), op.kernels[backend]
    return kernel.why_not(arguments) or kernel.why_not_now(arguments)


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
    return interpreted and sample.name != op.make_samples("cpu")[0].name


def oracle_of(op: Op[...]) -> Front:
    """The op's sequential oracle."""
    oracle: Front = getattr(importlib.import_module(f"tests.ops.{op.name}.oracle"), op.name)
    return oracle


def with_output(op: Op[...], sample: Sample) -> Sample:
    """The same call with an output to write that is full of numbers, so that what nobody writes shows."""
    if sample.kwargs.get("out") is not None:
        return sample
    out = op.allocate(**{k: v for k, v in op.bind(sample.args, sample.kwargs).items() if k != "output"})
    generator = torch.Generator().manual_seed(1)
    filled = torch.randn(out.shape, generator=generator).to(out)
    return Sample(sample.name, sample.args, {**sample.kwargs, "out": filled})


def results(op: Op[...], sample: Sample) -> dict[str, Tensor]:
    """The tensors of a call that the op mutates, by the op's names, without caches that were left out."""
    arguments = op.bind(sample.args, sample.kwargs)
    return {name: arguments[name] for name in sorted(op.mutates) if arguments[name] is not None}


def expected(op: Op[...], sample: Sample, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the oracle says that a call leaves in the tensors that the op mutates, computed in `dtype`.

    In float32 an oracle that knows how rounds what kernels round on their way (see OPERANDS). It runs on the CPU, where
    one element costs no launch, and so the budget is the same on every machine.
    """
    oracle, extra = oracle_of(op), {}
    if dtype == torch.float32 and "operands" in inspect.signature(oracle).parameters:
        bound = op.bind(sample.args, sample.kwargs)
        extra["operands"] = functools.reduce(torch.promote_types, (bound[n].dtype for n in OPERANDS if n in bound))
    call = sample.to(dtype, "cpu").clone()
    names = ["output", *(p.name for p in op.parameters if p.name in op.mutates - {"output"})]
    return dict(zip(names, oracle(*call.args, **call.kwargs, dtype=dtype, **extra), strict=True))


def judge(op: Op[...], sample: Sample, front: Front) -> None:
    """Run `front` on a copy of a sample; raise AssertionError unless it did what the op's contract says, no more."""
    sample = with_output(op, sample)
    mine = sample.clone()
    front(*mine.args, **mine.kwargs)
    for name, actual in results(op, mine).items():
        truth, low = (expected(op, sample, dtype)[name] for dtype in (torch.float64, torch.float32))
        assert_within_budget(actual.cpu(), truth, low, f"{op.name}, {sample.name}: {name}")
    _assert_rest_untouched(op, sample, mine)


def _assert_rest_untouched(op: Op[...], before: Sample, after: Sample) -> None:
    """What the op does not mutate, and the padding around what it does, keeps its bits."""
    old, new = (op.bind(s.args, s.kwargs) for s in (before, after))
    for name, tensor in old.items():
        if not isinstance(tensor, Tensor):
            continue
        was, now = (_storage(t) for t in (tensor, new[name]))
        if name in op.mutates:
            inside = torch.zeros(was.shape, dtype=torch.bool, device=was.device)
            inside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
            was, now = was[~inside], now[~inside]
        assert torch.equal(was.view(torch.uint8), now.view(torch.uint8)), (
            f"{op.name}, {before.name}: {name} was touched"
        )


def _storage(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, padding included, as one flat tensor."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def front_on(op: Op[...], backend: str) -> Front:
    """The op's front, with every call on one backend."""

    def front(*args: Any, **kwargs: Any) -> Any:
        with use_backend(backend):
            return op(*args, **kwargs)

    return front


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
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
