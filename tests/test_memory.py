"""Tensors that overlap, or that torch would not update: refused in a sentence before anything is written."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import mamba_ops
from mamba_ops.layers import Mamba2
from mamba_ops.registry import Op, Sample
from mamba_ops.registry.memory import may_overlap, overlaps_itself
from mamba_ops.testing.judge import front_on, with_output
from tests.conftest import ACCELERATOR
from tests.harness import OPS, backends_here, cases
from tests.test_bad_input import assert_untouched, changed

pytestmark = pytest.mark.usefixtures("no_grad")
DEVICE = ACCELERATOR or torch.device("cpu")


def first(op: Op[...]) -> Sample:
    """The op's first sample, with an output."""
    return with_output(op, op.make_samples(DEVICE)[0]).clone()


def shown(name: str) -> str:
    return "out" if name == "output" else name


def tensors(op: Op[...], sample: Sample) -> dict[str, Tensor]:
    """The tensors of a call on its device that have elements."""
    arguments = op.bind(sample.args, sample.kwargs).items()
    return {shown(n): a for n, a in arguments if isinstance(a, Tensor) and a.numel() and n != "counts"}


def pairs() -> Iterator[tuple[Op[...], str, str]]:
    """Each op, a tensor that it writes, and another of its tensors."""
    for op in OPS:
        found = tensors(op, first(op))
        for written in map(shown, sorted(op.mutates)):
            for other in found:
                if written in found and other != written:
                    yield op, written, other


def in_one_buffer(one: Tensor, two: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """Copies of two tensors in one buffer, the second `gap` bytes behind the end of the first."""
    at = one.numel() * one.itemsize + gap
    at += -at % 16 if gap >= 0 else -(at % two.itemsize)
    buffer = torch.zeros(at + two.numel() * two.itemsize + 16, dtype=torch.uint8, device=one.device)

    def copy(tensor: Tensor, start: int) -> Tensor:
        end = start + tensor.numel() * tensor.itemsize
        return buffer[start:end].view(tensor.dtype).view(tensor.shape)

    copies = copy(one, 0), copy(two, at)
    for there, tensor in zip(copies, (one, two), strict=True):
        there.copy_(tensor)
    return copies


def looked_at() -> AbstractContextManager[object]:
    """Within the block every call's memory is looked at: on a device, otherwise, when a call is first decided on."""
    return nullcontext() if DEVICE.type == "cpu" else mamba_ops.checking()


@pytest.mark.parametrize(
    ("op", "written", "other"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] * (number % 4 > 0), id="-".join((pair[0].name, *pair[1:])))
        for number, pair in enumerate(pairs())
    ],
)
def test_what_an_op_writes_shares_memory_with_nothing(op: Op[...], written: str, other: str) -> None:
    good = first(op)
    found = tensors(op, good)
    for gap, refused in ((0, False), (-1, True)):
        here, there = in_one_buffer(found[other], found[written], gap)
        call = changed(op, good, other, lambda _, t=here: t)
        call = Sample(call.name, call.args, dict(call.kwargs))
        arguments = {shown(n): a for n, a in op.bind(call.args, call.kwargs).items()} | {other: here, written: there}
        before = {n: a.clone() for n, a in arguments.items() if isinstance(a, Tensor)}
        expected = rf"mamba_ops::{op.name}: ({written}|{other}): got a tensor that shares memory with "
        with looked_at(), pytest.raises(ValueError, match=expected) if refused else nullcontext():
            op(**arguments)
        if refused:
            assert all(torch.equal(tensor, arguments[n]) for n, tensor in before.items())


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_out_that_is_an_input(op: Op[...]) -> None:
    """Also after a call with another output was remembered; it may be the one that the contract allows."""
    good = first(op)
    found = tensors(op, good)
    like = [n for n, t in found.items() if t.shape == found["out"].shape and t.is_floating_point() and n != "out"]
    assert like or op.composed
    for _ in range(2):
        op(*good.clone().args, **good.clone().kwargs)
    for name in like:
        arguments = {shown(n): a for n, a in op.bind(good.clone().args, good.kwargs).items()}
        arguments["out"] = arguments[name]
        refused = pytest.raises(ValueError, match=f"out: got a tensor that shares memory with {name}, expected one in")
        with nullcontext() if name == op.out_may_be else refused:
            op(**arguments)
        part = arguments[name].view_as(arguments[name])
        with looked_at(), nullcontext() if name == op.out_may_be else refused:
            op(**{**arguments, "out": part})


@pytest.mark.parametrize(
    ("op", "backend", "sample"), [case for case in cases(DEVICE) if case.values[0].out_may_be is not None]
)
def test_out_that_may_be_an_input_gives_the_same_bits(op: Op[...], backend: str, sample: Sample) -> None:
    apart = sample.clone()
    name = op.out_may_be
    arguments = {shown(n): a for n, a in op.bind(apart.args, apart.kwargs).items()}
    arguments["out"] = arguments[name].clone()
    other = sample.clone()
    together = {shown(n): a for n, a in op.bind(other.args, other.kwargs).items()}
    together["out"] = together[name]
    if overlaps_itself(together[name]):
        pytest.skip("such an x cannot be written")
    front_on(op, backend)(**arguments)
    front_on(op, backend)(**together)
    for written in map(shown, op.mutates):
        assert torch.equal(arguments[written], together[written]), written


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].clone().expand(tensor.shape)


def overlapping_rows(tensor: Tensor) -> Tensor:
    row = tensor[0].numel()
    return tensor.new_zeros(2 * row * tensor.shape[0]).as_strided(
        tensor.shape, (max(row - 1, 1), *tensor[0].contiguous().stride())
    )


def made_in_inference_mode(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "expanded": (expanded, "got shape .* with strides .*, expected a tensor whose elements each have a place"),
    "overlapping rows": (overlapping_rows, "got shape .* with strides .*, expected a tensor whose elements each have"),
    "inference": (made_in_inference_mode, "got a tensor made in inference mode, expected an ordinary one"),
    "sparse": (lambda t: t.to_sparse(), "got a sparse_coo tensor, expected a strided one"),
    "negated": (torch._neg_view, r"got a view that negates its memory \(is_neg\(\)\), expected a plain tensor"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_what_cannot_be_written(op: Op[...], wrong: str) -> None:
    """Whether or not the same call on a right tensor was remembered before, and nothing is half updated."""
    make, said = WRONG[wrong]
    names = [name for name in sorted(map(shown, op.mutates)) if tensors(op, first(op)).get(name) is not None]
    assert "out" in names
    for name in names:
        good = first(op)
        for _ in range(2):
            bad = changed(op, good, name, make)
            before = copied(bad)
            with pytest.raises(ValueError, match=f"mamba_ops::{op.name}: {name}: {said}"):
                op(*bad.args, **bad.kwargs)
            assert_untouched(before, copied(bad))
            op(*good.clone().args, **good.clone().kwargs)


def copied(sample: Sample) -> Sample:
    """What the sample's tensors hold, to compare."""

    def copy(value: Any) -> Any:
        return value.to_dense().clone() if isinstance(value, Tensor) else value

    return Sample(sample.name, tuple(map(copy, sample.args)), {n: copy(v) for n, v in sample.kwargs.items()})


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_call_refuses_a_cache_made_in_inference_mode() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8, 4)
    cache = made_in_inference_mode(torch.zeros(2, 8, 3))

    def step(x: Tensor) -> Tensor:
        return mamba_ops.causal_conv1d_update(x, cache, weight)

    compiled = torch.compile(step, fullgraph=True)
    with pytest.raises(ValueError, match="conv_state: got a tensor made in inference mode"):
        compiled(x)
    assert not cache.any()
    with torch.inference_mode():
        step(x)
    assert cache.any()


def test_negated_inputs_are_read_as_what_they_mean() -> None:
    op = mamba_ops.causal_conv1d_update
    caches = torch.zeros(2, 2, 8, 3)
    x, weight = torch.randn(2, 8), torch.randn(8, 4)
    for backend in backends_here(op, torch.device("cpu")):
        out, expected = (
            front_on(op, backend)(t, c, weight) for t, c in zip((torch._neg_view(x), -x), caches.clone(), strict=True)
        )
        assert torch.equal(out, expected)


def test_pages_and_columns_do_not_overlap() -> None:
    pages = torch.zeros(5, 100)
    conv, ssm = pages[:, :24].view(5, 8, 3), pages[:, 24:56].view(5, 8, 4)
    assert not may_overlap(conv, ssm)
    assert not may_overlap(ssm, conv)
    assert may_overlap(conv, pages[:, 23:25])
    as_bytes = pages.view(torch.uint8)[:, 4 * 56 :].view(torch.bfloat16)
    assert not may_overlap(ssm, as_bytes)
    projected = torch.zeros(3, 7, 20)
    assert not may_overlap(projected[..., :12], projected[..., 12:])
    assert not may_overlap(projected[..., :12].transpose(0, 1), projected[..., 12:])
    assert may_overlap(projected[..., :13], projected[..., 12:])
    assert may_overlap(projected, projected[1, 2, 3:4])
    for tensor, overlaps in (
        (projected.transpose(0, 2), False),
        (projected[:, ::2, ::3], False),
        (projected[:1].expand(3, 7, 20), True),
        (projected.as_strided((4, 5), (4, 1)), True),
        (projected.as_strided((4, 5), (5, 1)), False),
        (projected[:0].expand(0, 7, 20), False),
        (projected.as_strided((1, 5), (0, 1)), False),
    ):
        assert overlaps_itself(tensor) is overlaps


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_layer_refuses_an_ssm_state_that_requires_grad_before_it_convolves(compiles: bool) -> None:
    layer = Mamba2(32, heads=2, head_dim=16, dstate=16).requires_grad_(False)
    conv_state, ssm_state = layer.empty_caches(2)
    ssm_state.requires_grad_()
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer
    with (
        torch.enable_grad(),
        pytest.raises(ValueError, match=r"ssm_state: got .* in grad mode, one that requires no grad"),
    ):
        call(torch.randn(2, 5, 32), conv_state, ssm_state)
    assert not conv_state.any()
