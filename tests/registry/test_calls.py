"""One call: checks, gradients, what is remembered, samples."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mamba_ops.registry import DeclarationError, Op, Sample
from tests.registry.toys import call


def test_a_remembered_call_is_not_checked_again(add: Op[...]) -> None:
    seen = []
    add.validate(lambda x: seen.append(x.shape))
    for _ in range(3):
        call(add)
        with torch.inference_mode():
            call(add)
    assert len(seen) == 2  # once each for grad mode and inference mode
    for n in (4, 5, 4, 5):
        add(torch.zeros(n), torch.ones(n))
    assert len(seen) == 4


def test_the_same_tensor_twice_and_scalars_and_empties(add: Op[...]) -> None:
    for shape in ((), (0,), (2, 0)):
        for _ in range(2):
            x = torch.ones(shape)
            assert torch.equal(add(torch.zeros(shape), x, bias=x), x * 2)


@pytest.mark.parametrize("argument", ["total", "x", "bias", "out"])
def test_gradients_are_refused_in_a_sentence(add: Op[...], argument: str) -> None:
    tensors = {"total": torch.zeros(3), "x": torch.ones(3), "bias": torch.ones(3), "out": torch.zeros(3)}
    tensors[argument].requires_grad_()
    for op in (add, lambda total, x, *, bias, out: add.overload(total, x, bias=bias, output=out)):
        with pytest.raises(
            ValueError, match=rf"toys::add: {argument}: got a tensor that requires grad .* torch.no_grad\(\)"
        ):
            op(tensors["total"], tensors["x"], bias=tensors["bias"], out=tensors["out"])
    assert not tensors["total"].any()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            add(*(tensors[n].detach() for n in ("total", "x")), bias=tensors["bias"])


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_refused_after_the_same_call_was_remembered(add: Op[...], before: Any) -> None:
    total, x, out = torch.zeros(3), torch.ones(3), torch.zeros(3)
    for _ in range(2):
        with before():
            add(total, x, out=out)
        x.requires_grad_()
        with pytest.raises(ValueError, match="toys::add: x: got a tensor that requires grad"):
            add(total, x, out=out)
        with torch.no_grad():
            add(total, x, out=out)
        with pytest.raises(ValueError, match="toys::add: x: got a tensor that requires grad"):
            add(total, x, out=out)
        x = x.detach()


def test_meta_tensors_among_real_ones(add: Op[...]) -> None:
    with pytest.raises(ValueError, match="toys::add: x: got a tensor on meta, expected cpu"):
        add(torch.zeros(3), torch.ones(3, device="meta"), out=torch.empty(3))
    everything = add(torch.zeros(3, device="meta"), torch.ones(3, device="meta"))
    assert everything.is_meta


def test_samples(add: Op[...]) -> None:
    with pytest.raises(DeclarationError, match="has no samples"):
        add.make_samples("cpu")

    @add.samples
    def _samples(device: torch.device, *, n: int = 3) -> Iterator[Sample]:
        yield Sample("base", (torch.zeros(n, device=device), torch.ones(n, device=device)))

    [sample] = add.make_samples("cpu", n=5)
    assert sample.args[0].shape == (5,)
    copied = sample.clone()
    add(*copied.args, **copied.kwargs)
    assert not sample.args[0].any()
    assert copied.args[0].all()


def test_a_clone_keeps_padding_and_strides() -> None:
    pages = torch.arange(24.0).view(2, 12)
    view = pages.as_strided((2, 2, 4), (12, 1, 2), 1)
    copied = Sample("padded", (view,)).clone().args[0]
    assert (copied.stride(), copied.storage_offset()) == (view.stride(), 1)
    assert copied.untyped_storage().nbytes() == pages.untyped_storage().nbytes()
    assert torch.equal(copied, view)
