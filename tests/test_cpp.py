"""The backend cpp: what it is built of and when, its functions and conversions, and that tests catch bugs in it."""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.ops._cpp import build
from mamba_ops.registry import Backend, NoBackendError, Op, no_jit
from mamba_ops.testing.judge import front_on, refusal
from tests.harness import OPS, judge
from tests.ops.tables import tables_of
from tests.test_cpu import CALLS, wide_sample

pytestmark = pytest.mark.skipif(build.why_no_compiler() is not None, reason="there is no C++ compiler")
CPP = [op for op in OPS if "cpp" in op.kernels]
BUGS = [
    pytest.param(op, bug, marks=pytest.mark.slow if number >= 1 else (), id=f"{op.name}-{name}")
    for op in CPP
    for number, (name, bug) in enumerate(tables_of(op).CPP_BUGS.items())
]


def source_of(op: Op[...]) -> str:
    return (Path(build.__file__).parents[1] / op.name / "kernel.cpp").read_text()


@pytest.fixture
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is built or loaded within the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.run_of.cache_clear()
    yield
    build.run_of.cache_clear()


# ---- bugs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CPP, ids=lambda op: op.name)
def test_ten_bugs_of_every_kernel_can_be_planted(op: Op[...]) -> None:
    bugs = tables_of(op).CPP_BUGS
    assert len(bugs) >= 10
    for right, wrong in bugs.values():
        assert source_of(op).count(right) == 1, right
        assert right != wrong


@pytest.mark.parametrize(("op", "bug"), BUGS)
def test_planted_bug_is_caught(
    op: Op[...], bug: tuple[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = [s for s in op.make_samples("cpu") if refusal(op, "cpp", s) is None]
    samples += [wide_sample(name) for name in CALLS if name.partition(",")[0] == op.name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = build.built(op.name, source_of(op).replace(*bug))
    monkeypatch.setattr(build, "run_of", lambda name: run)

    def judge_all() -> None:
        for sample in samples:
            judge(op, sample, front_on(op, "cpp"))

    with pytest.raises(AssertionError):
        judge_all()


# ---- functions and conversions ---------------------------------------------------------------------------------------

_ELEMENTWISE = """
#include "common.h"
extern "C" void run(const int64_t* numbers) {
  Call call{numbers};
  const int64_t count = call.number();
  const Tensor from(call, 1), to(call, 1);
  for (int64_t i = 0; i < count; i += LANES) {
    const int64_t some_of = std::min(LANES, count - i);
    float x[LANES] = {};
    from.read(i, 1, some_of, x);
    put(FUNCTION(some(x)), x);
    to.write(i, 1, some_of, x);
  }
}
"""


@functools.cache
def elementwise(function: str) -> build.Run:
    return build.built("elementwise", _ELEMENTWISE.replace("FUNCTION", function))


def applied(function: str, given: Tensor, dtype: torch.dtype) -> Tensor:
    from mamba_ops.ops._cpp.call import whole

    out = torch.empty_like(given, dtype=dtype)
    elementwise(function)([given.numel(), *whole(given, 1), *whole(out, 1)])
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_numbers_of_two_bytes_are_read(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    read = applied("", every, torch.float32)
    torch.testing.assert_close(read, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    halfway = (every.float() + every.roll(-1).float()) / 2  # ties
    given = torch.cat((bits.view(torch.float32), torch.randn(2**16, generator=generator), halfway))
    torch.testing.assert_close(applied("", given, dtype), given.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("function", "truth", "low", "high", "units"),
    [
        ("exp", torch.exp, -87, 88, 2),
        ("exp2", torch.exp2, -126, 127, 2),
        ("softplus", torch.nn.functional.softplus, -80, 40, 3),
        ("silu", torch.nn.functional.silu, -80, 80, 4),
    ],
)
def test_functions_are_right_to_the_last_bits(
    function: str, truth: "torch.nn.Module", low: float, high: float, units: int
) -> None:
    given = torch.cat((torch.linspace(low, high, 2**16), torch.linspace(-2, 2, 2**16)))
    exact = truth(given.double())
    error = (applied(function, given, torch.float32).double() - exact).abs() / exact.abs().clamp(min=1e-37)
    assert error.max() <= units * torch.finfo(torch.float32).eps


def test_functions_at_the_ends() -> None:
    given = torch.tensor([-torch.inf, -1e30, -200.0, 0.0, torch.inf, torch.nan])
    expected = {"exp2": torch.exp2, "softplus": torch.nn.functional.softplus}
    for name, function in expected.items():
        torch.testing.assert_close(
            applied(name, given, torch.float32), function(given), rtol=0, atol=1e-37, equal_nan=True
        )


# ---- how it is built -------------------------------------------------------------------------------------------------


def usual_call() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 8), torch.zeros(2, 8, 3), torch.randn(8, 4)


def test_nobody_gets_it_unasked() -> None:
    explained = str(mamba_ops.explain(mamba_ops.causal_conv1d_update, *usual_call()))
    assert "torch   runs (default order)" in explained
    names = [backend.name for backend in mamba_ops.registry.backends()]
    assert names.index("cpp") > names.index("torch")


@pytest.mark.usefixtures("_empty_cache")
def test_it_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = build._compile
    monkeypatch.setattr(build, "_compile", lambda op, *rest: (compiled.append(op), real(op, *rest)))
    for _ in range(2):
        build.run_of.cache_clear()  # as in a new process
        front_on(mamba_ops.causal_conv1d_update, "cpp")(*usual_call())
    assert compiled == ["causal_conv1d_update"]


@pytest.mark.usefixtures("_empty_cache")
def test_a_warm_up_builds_it() -> None:
    mamba_ops.warm_up("causal_conv1d_update", device="cpu", backends=["cpp"])
    with no_jit():
        front_on(mamba_ops.causal_conv1d_update, "cpp")(*usual_call())


@pytest.mark.usefixtures("_empty_cache")
def test_not_while_nothing_may_be_compiled() -> None:
    with no_jit(), pytest.raises(mamba_ops.registry.CompilationError, match=r"causal_conv1d_update \(C\+\+\)"):
        front_on(mamba_ops.causal_conv1d_update, "cpp")(*usual_call())


@pytest.mark.usefixtures("_empty_cache")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/no/such/compiler", "with a C\\+\\+ compiler, and CXX names /no/such/compiler"),
        ("false", "false does not build the kernel of causal_conv1d_update: exit code 1"),
    ],
)
def test_without_a_compiler_it_refuses_in_a_sentence(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an order of several goes on."""
    monkeypatch.setenv("CXX", compiler)
    cpp = next(b for b in mamba_ops.registry.backends() if b.name == "cpp")
    monkeypatch.setattr(cpp, "_import_problem", cpp._try_import)
    cpp.priority = cpp.priority  # forget what was decided
    x, state, weight = usual_call()
    with pytest.raises(NoBackendError, match=reason):
        front_on(mamba_ops.causal_conv1d_update, "cpp")(x, state, weight)
    expected = mamba_ops.causal_conv1d_update(x, state.clone(), weight)
    with warnings.catch_warnings(), mamba_ops.use_backend("cpp:torch"):
        warnings.simplefilter("ignore", RuntimeWarning)  # it says so once
        assert torch.equal(mamba_ops.causal_conv1d_update(x, state, weight), expected)
    cpp.priority = cpp.priority


@pytest.mark.usefixtures("_empty_cache")
def test_where_nothing_can_be_kept_it_refuses_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no home to write to."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NoBackendError, match=r"file/mamba_ops, which cannot be written to \(.*\); set XDG_CACHE_HOME"):
        front_on(mamba_ops.causal_conv1d_update, "cpp")(*usual_call())


def test_other_packages_can_be_first() -> None:
    """Its place is after torch's, so that a backend of priority 0 or more comes before it."""
    other = Backend("other", devices=("cpu",), priority=0)
    order = [b.name for b in mamba_ops.registry.backends()]
    other.remove()
    assert order.index("cpp") > max(order.index("other"), order.index("torch"))
