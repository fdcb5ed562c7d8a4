"""The kernels that are for Hopper alone: bits are those of the portable ones."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mamba_ops.cold_start import fitting
from mamba_ops.ops._triton import gluon, prepared
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan
from mamba_ops.ops.mamba_chunk_scan.triton import hopper_launch, launch
from mamba_ops.registry import use_backend

NAME = mamba_chunk_scan.name


def is_hopper() -> bool:
    return torch.cuda.is_available() and gluon.runs_on_hopper(0, hopper_launch.MODULE)


needs_hopper = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU, and a Triton with Gluon")


def call(lengths: tuple[int, ...], dtype: torch.dtype, chunk_size: int, **given: Any) -> dict[str, Any]:
    """Packed rows, with what every call has; all of `given` besides."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens, heads, groups = sum(lengths), 4, 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    joint = normal(tokens, (heads * 64 + 2 * groups * 128)).split([heads * 64, groups * 128, groups * 128], dim=1)
    x, B, C = (part.unflatten(1, (-1, size)) for part, size in zip(joint, (64, 128, 128), strict=True))
    return {
        "x": x,
        "dt": normal(tokens, heads),
        "A": -1 - 15 * torch.rand(heads, generator=generator, device="cuda"),
        "B": B,
        "C": C,
        "chunk_size": chunk_size,
        "dt_bias": normal(heads) - 3,
        "dt_softplus": True,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda"),
        "z": normal(tokens, heads, 64) if "z" in given else None,
        "D": {"head": normal(heads), "channel": normal(heads, 64), None: None}[given.get("D")],
    }


def results(arguments: dict[str, Any], states: torch.Tensor, kept: torch.Tensor | None) -> list[torch.Tensor]:
    prepared.forget()
    states, kept = states.clone(), None if kept is None else kept.clone()
    with torch.inference_mode(), use_backend("triton"):
        out = mamba_chunk_scan(**arguments, ssm_state=states, chunk_states=kept)
    return [out, states, *([] if kept is None else [kept])]


def portable(monkeypatch: pytest.MonkeyPatch, *call: Any) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(launch, "is_hopper_walk", lambda *_, **__: False)
        patch.setattr(launch, "_segment", lambda *_: 1000)  # states before segments are rounded otherwise there
        found = results(*call)
    prepared.forget()
    return found


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "chunk_size", "kept"),
    [
        (torch.bfloat16, 256, None),
        (torch.bfloat16, 256, torch.float32),
        (torch.bfloat16, 64, torch.bfloat16),
        (torch.float16, 100, torch.float32),
    ],
)
@pytest.mark.parametrize("given", [{}, {"z": True, "D": "head"}, {"D": "channel"}], ids=lambda given: "-".join(given))
@pytest.mark.parametrize("moves", [False, True], ids=["in place", "padding, moves, new rows and earlier tokens"])
@pytest.mark.parametrize("lengths", [(64,), (130, 127, 2000), (1000, 64, 3, 0, 129, 65, 1, 700)], ids=len)
def test_bits_are_those_of_the_portable_kernels(lengths, dtype, chunk_size, kept, given, moves, monkeypatch):
    rows, arguments = len(lengths), call(lengths, dtype, chunk_size, **given)
    states = torch.randn(2 * rows + 1, 4, 64, 128, device="cuda").to(torch.bfloat16 if moves else torch.float32)
    slots = torch.arange(rows, 0, -1, dtype=torch.int32, device="cuda")
    if moves:
        slots[-1] = -1
        numbers = torch.arange(rows, device="cuda")
        moved = torch.arange(rows + 1, 2 * rows + 1, dtype=torch.int32, device="cuda")
        moved[0] = -1
        arguments |= {"write_slots": moved, "num_computed_tokens": numbers * 37}
        arguments["has_initial_state"] = numbers % 2 == 0
    arguments["slots"] = slots
    chunks = None
    if kept is not None:
        chunks = torch.zeros(sum(lengths) // chunk_size + 2 * rows, 4, 64, 128, dtype=kept, device="cuda")
    expected = portable(monkeypatch, arguments, states, chunks)
    for pieces in (4, 1000):
        monkeypatch.setattr(launch, "_segment", lambda *_, pieces=pieces: pieces)
        found = results(arguments, states, chunks)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    prepared.forget()


@needs_hopper
@pytest.mark.gpu
def test_a_row_that_is_not_finite_leaves_others_alone():
    arguments = call((70, 100, 64), torch.bfloat16, 64, D="head")
    states = torch.randn(3, 4, 64, 128, device="cuda")
    expected, *_ = results(arguments, states, None)
    for name in "xBC":
        arguments[name] = arguments[name].clone()
        arguments[name][70:170] = float("nan")
    found, *_ = results(arguments, states, None)
    assert torch.equal(found[:70], expected[:70])
    assert torch.equal(found[170:], expected[170:])
    assert found[70:170].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "sizes", "kernels"),
    [
        ("bfloat16", {}, {"_advance", "_walk"}),
        ("float16", {}, {"_advance", "_walk"}),
        pytest.param("float32", {}, {"_states", "_scan"}, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"dim": 32}, {"_states", "_scan"}, marks=pytest.mark.slow),
        pytest.param("bfloat16", {"dstate": 64}, {"_states", "_scan"}, marks=pytest.mark.slow),
        ("bfloat16", {"heads": 3, "groups": 3}, {"_states", "_scan"}),
    ],
)
def test_on_hopper_heads_of_64_with_2_bytes_have_kernels_of_their_own(dtype, sizes, kernels):
    rows = list(fitting.fits(["sm_90"], ops=[NAME], dtypes=[dtype], sizes=sizes))
    assert {row.kernel.rpartition(".")[2] for row in rows} == {"_steps", *kernels}
    assert all(row.fits for row in rows), rows


@pytest.mark.slow  # it compiles some twenty kernels
def test_they_compile_for_all_that_can_be_given():
    rows = list(fitting.fits(["sm_90"], ops=[NAME], dtypes=["bfloat16"], sizes={"chunk_size": 64}, samples=None))
    assert sum(row.kernel.endswith("_walk") for row in rows) > 10
    assert all(row.fits for row in rows), rows
