"""The walk that is for Hopper alone: bits are those of the portable one, however many programs walk."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

import triton

from mamba_ops.cold_start import fitting
from mamba_ops.ops._common.delta_rule_bench import prefill_case
from mamba_ops.ops._triton import gluon, prepared
from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from mamba_ops.ops.chunk_gated_delta_rule.triton import launch as gated_delta_rule
from mamba_ops.ops.chunk_kda import chunk_kda
from mamba_ops.ops.chunk_kda.triton import launch as kda
from mamba_ops.registry import use_backend

LAUNCHERS = {chunk_gated_delta_rule: gated_delta_rule, chunk_kda: kda}
WALK = "mamba_ops.ops._triton.hopper_walk"


def is_hopper() -> bool:
    return torch.cuda.is_available() and gluon.runs_on_hopper(0, WALK)


needs_hopper = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU, and a Triton with Gluon")
each_op = pytest.mark.parametrize("op", LAUNCHERS, ids=[op.name for op in LAUNCHERS])


def case_of(op, lengths):
    torch.manual_seed(0)
    return prefill_case(op, lengths, torch.device("cuda"), by_channel=op is chunk_kda)


def results(op, arguments, states, out):
    prepared.forget()
    states = states.clone()
    out.fill_(float("nan"))
    with torch.inference_mode(), use_backend("triton"):
        op(**arguments, ssm_state=states, out=out)
    return out.clone(), states


@needs_hopper
@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("lengths", [(64,), (130, 127), (1000, 64, 3, 0, 129, 65, 1, 700)], ids=len)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moves", [False, True], ids=["in place", "padding, moves and new rows"])
def test_bits_are_those_of_the_portable_walk(op, lengths, dtype, state_dtype, moves, monkeypatch):
    case = case_of(op, lengths)
    arguments = case.arguments | {name: case.arguments[name].to(dtype) for name in "qkv"}
    states, out = case.caches["ssm_state"].to(state_dtype), case.out.to(dtype)
    if moves:  # to slots that no row reads
        slots = arguments["slots"].clone()
        slots[-1] = -1
        new = torch.arange(len(lengths), device="cuda") % 2 == 0
        back = slots.flip(0)
        moved = torch.where(back < 0, back, back + len(states))
        arguments |= {"slots": slots, "write_slots": moved, "has_initial_state": new}
        states = torch.cat([states, torch.zeros_like(states)])
    found = []
    for parts in (1, 2):
        monkeypatch.setattr(gluon, "multiprocessors", lambda _, parts=parts: (parts - 1) << 30)
        found.append(results(op, arguments, states, out))
    monkeypatch.setattr(LAUNCHERS[op], "is_hopper_walk", lambda *_, **__: False)
    expected = results(op, arguments, states, out)
    prepared.forget()
    for one in found:
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


@needs_hopper
@pytest.mark.gpu
@each_op
def test_rows_have_the_bits_that_they_have_alone(op):
    lengths = (1000, 64, 3, 129)
    case = case_of(op, lengths)
    whole, _ = results(op, case.arguments, case.caches["ssm_state"], case.out)
    begin = 0
    for row, length in enumerate(lengths):
        its = slice(begin, begin + length)
        begin += length
        arguments = case.arguments | {name: case.arguments[name][its] for name in ("q", "k", "v", "g", "beta")}
        arguments |= {name: case.arguments[name][row : row + 1] for name in ("slots", "has_initial_state")}
        arguments |= {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32, device="cuda")}
        alone, _ = results(op, arguments, case.caches["ssm_state"], torch.empty_like(case.out[its]))
        assert torch.equal(alone, whole[its])


@needs_hopper
@pytest.mark.gpu
@each_op
def test_a_row_that_is_not_finite_leaves_others_alone(op):
    case = case_of(op, (70, 100, 64))
    arguments, states = dict(case.arguments), case.caches["ssm_state"]
    expected, _ = results(op, arguments, states, case.out)
    for name in "qkv":
        arguments[name] = arguments[name].clone()
        arguments[name][70:170] = float("nan")
    found, _ = results(op, arguments, states, case.out)
    assert torch.equal(found[:70], expected[:70])
    assert torch.equal(found[170:], expected[170:])
    assert found[70:170].isnan().all()


@each_op
@pytest.mark.parametrize(
    ("dtype", "sizes", "is_special"),
    [
        ("bfloat16", {}, True),
        ("float16", {}, True),
        pytest.param("float32", {}, False, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"k_dim": 64}, False, marks=pytest.mark.slow),
        ("bfloat16", {"v_dim": 64}, False),
    ],
)
def test_on_hopper_wide_heads_of_2_bytes_have_kernels_of_their_own(op, dtype, sizes, is_special):
    rows = list(fitting.fits(["sm_90"], ops=[op.name], dtypes=[dtype], sizes=sizes))
    kernels = {row.kernel.rpartition(".")[2] for row in rows}
    assert ("_walk" in kernels, "_scan" in kernels) == (is_special, not is_special)
    assert "_solve" in kernels or (is_special and op is chunk_gated_delta_rule and "_invert" in kernels)
    assert all(0 < row.shared <= row.limit for row in rows), rows


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_without_gluon_nothing_is_for_hopper(error, monkeypatch):
    def fail(name):
        raise error(name)

    monkeypatch.setattr(gluon, "family", lambda _: "cuda-90")
    gluon._imports.cache_clear()
    assert gluon.runs_on_hopper(0, WALK) == triton.__version__.startswith(gluon.KNOWN)
    gluon._imports.cache_clear()
    monkeypatch.setattr(importlib, "import_module", fail)
    assert not gluon.runs_on_hopper(0, WALK)
    gluon._imports.cache_clear()


@pytest.mark.parametrize("version", ["3.5.1", "3.60.0", "4.0.0"])
def test_an_unknown_triton_has_the_portable_kernels(version, monkeypatch):
    monkeypatch.setattr(gluon, "family", lambda _: "cuda-90")
    monkeypatch.setattr(triton, "__version__", version)
    gluon._imports.cache_clear()
    assert not gluon.runs_on_hopper(0, WALK)
    gluon._imports.cache_clear()
