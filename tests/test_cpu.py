"""Ops on a CPU at widths of models, where vectors and threads share the work: no sample is large enough to show it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.ops._common.samples import SampleTensors
from mamba_ops.registry import Sample
from mamba_ops.testing.judge import front_on
from tests.harness import backends_here, judge

CPU = torch.device("cpu")
ROWS, TOKENS = 5, 70
WIDTHS = (96, 1019)  # of Mamba-1; 1019 is prime: no vector ends where a row does


def calls() -> dict[str, dict[str, Any]]:
    """Name of an op, and what else is said of it, to a call with dense rows; all but parameters are by row."""
    make = SampleTensors(CPU, torch.float32)

    def mamba1(width: int, *lead: int) -> dict[str, Any]:
        tokens = (ROWS, *lead)
        return {
            "x": make.normal(*tokens, width),
            "dt": make.normal(*tokens, width),
            "A": -make.normal(width, 16).exp(),
            "B": make.normal(*tokens, 16),
            "C": make.normal(*tokens, 16),
            "D": make.normal(width),
            "z": make.normal(*tokens, width),
            "dt_bias": make.normal(width),
            "dt_softplus": True,
            "ssm_state": make.normal(ROWS, width, 16),
        }

    def mamba2(heads: int, groups: int, *lead: int) -> dict[str, Any]:
        tokens = (ROWS, *lead)
        return {
            "x": make.normal(*tokens, heads, 40),
            "dt": make.normal(*tokens, heads),
            "A": -make.normal(heads).exp(),
            "B": make.normal(*tokens, groups, 72),
            "C": make.normal(*tokens, groups, 72),
            "D": make.normal(heads),
            "z": make.normal(*tokens, heads, 40),
            "dt_bias": make.normal(heads),
            "dt_softplus": True,
            "ssm_state": make.normal(ROWS, heads, 40, 72),
        }

    def conv(width: int, *lead: int) -> dict[str, Any]:
        weights = {"weight": make.normal(width, 4), "bias": make.normal(width)}
        return {"x": make.normal(ROWS, *lead, width), "conv_state": make.normal(ROWS, width, 3), **weights}

    begun = torch.ones(ROWS, dtype=torch.bool)
    found = {}
    for width in WIDTHS:
        found[f"selective_scan, {width}"] = {**mamba1(width, TOKENS), "has_initial_state": begun}
        found[f"selective_state_update, Mamba-1, {width}"] = mamba1(width)
        found[f"causal_conv1d, {width}"] = {**conv(width, TOKENS), "has_initial_state": begun}
        found[f"causal_conv1d_update, {width}"] = conv(width)
    for groups in (1, 2):
        scan = {**mamba2(6, groups, TOKENS), "chunk_size": 256, "has_initial_state": begun}
        found[f"mamba_chunk_scan, {groups} groups"] = scan
        found[f"selective_state_update, Mamba-2, {groups} groups"] = mamba2(6, groups)
    return found


CALLS = calls()
CASES = [
    pytest.param(backend, name, id=f"{backend}-{name}")
    for name in CALLS
    for backend in backends_here(getattr(mamba_ops, name.partition(",")[0]), CPU)
    if backend != "triton"  # which is interpreted here
]


def run(backend: str, name: str, rows: Tensor) -> Iterator[Tensor]:
    """What some rows of a call leave in the output, and in the state."""
    given = {n: v[rows] if isinstance(v, Tensor) and v.shape[0] == ROWS else v for n, v in CALLS[name].items()}
    state = given["ssm_state" if "ssm_state" in given else "conv_state"]
    with mamba_ops.use_backend(backend):
        yield getattr(mamba_ops, name.partition(",")[0])(**given)
    yield state


def wide_sample(name: str) -> Sample:
    return Sample(name, (), CALLS[name]).clone()


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_wide_calls_in_any_layout(backend: str, name: str) -> None:
    """Every tensor lies in memory with its first dimension innermost."""
    op, sample = getattr(mamba_ops, name.partition(",")[0]), wide_sample(name)

    def turned(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        backwards = range(value.dim() - 1, -1, -1)
        return value.permute(*backwards).contiguous().permute(*backwards)

    judge(op, Sample(name, (), {n: turned(v) for n, v in sample.kwargs.items()}), front_on(op, backend))


@pytest.mark.parametrize(("backend", "name"), [case for case in CASES if "_update" in case.values[1]])
def test_a_step_has_the_same_bits_with_slots(backend: str, name: str) -> None:
    op, slots = getattr(mamba_ops, name.partition(",")[0]), torch.arange(ROWS)
    plain, looked_up = (wide_sample(name).kwargs for _ in range(2))
    assert torch.equal(front_on(op, backend)(**plain), front_on(op, backend)(**looked_up, slots=slots))
    state = "ssm_state" if "ssm_state" in plain else "conv_state"
    assert torch.equal(plain[state], looked_up[state])


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_an_infinity_stays_in_its_channel(backend: str, name: str) -> None:
    op = getattr(mamba_ops, name.partition(",")[0])
    given, other = (wide_sample(name).kwargs for _ in range(2))
    other["x"][0, ..., 0] = torch.inf  # of every head
    whole, changed = (front_on(op, backend)(**kwargs) for kwargs in (given, other))
    same = whole == changed
    same[0, ..., 0] = True
    assert same.all()


@pytest.fixture(params=[1, 2], ids=lambda threads: f"{threads} threads")
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("backend", "name"), CASES)
def test_wide_calls_against_the_oracle(backend: str, name: str) -> None:
    op = getattr(mamba_ops, name.partition(",")[0])
    judge(op, wide_sample(name), front_on(op, backend))


@pytest.mark.parametrize(("backend", "name"), CASES)
@pytest.mark.usefixtures("_threads")
def test_a_wide_row_does_not_depend_on_the_others(backend: str, name: str) -> None:
    """Alone it has the same bits as among others, wherever it is."""
    for whole, backwards in zip(
        run(backend, name, torch.arange(ROWS)), run(backend, name, torch.arange(ROWS - 1, -1, -1)), strict=True
    ):
        assert torch.equal(whole, backwards.flip(0))
    whole = list(run(backend, name, torch.arange(ROWS)))
    for row in range(ROWS):
        for among, alone in zip(whole, run(backend, name, torch.tensor([row])), strict=True):
            assert torch.equal(among[row], alone[0])
