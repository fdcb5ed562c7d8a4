"""One call: checks, gradients, what is remembered, samples."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import registry
from mamba_ops.registry import DeclarationError, Op, Sample, bad_argument, checking, use_backend
from mamba_ops.registry import op as op_module
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


def test_values_are_checked_in_every_call(add: Op[...], elsewhere: Callable[[], None]) -> None:
    """On a CPU, and elsewhere within `checking()`; a call that a graph captures is not."""
    seen = []

    @add.validate_values
    def _validate_values(x: Tensor) -> None:
        seen.append(float(x[0]))
        if x[0] > 5:
            raise bad_argument("x", got=float(x[0]), expected="at most 5")

    total, good, bad = torch.zeros(3), torch.ones(3), torch.full((3,), 6.0)
    compiled = torch.compile(lambda total, x: add(total, x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            add(total, good)
            for call in (add, compiled):
                with pytest.raises(ValueError, match=r"^toys::add: x: got 6.0, expected at most 5$"):
                    call(total, bad)
        assert seen == [1.0, 6.0, 6.0] * 3
        assert total.tolist() == [3.0] * 3
        elsewhere()
        for _ in range(2):
            add(total, bad)
            compiled(total, bad)
            with checking():
                add(total, good)
                with use_backend("torch"), pytest.raises(ValueError, match=r"x: got 6\.0"):
                    add(total, bad)
                with pytest.raises(ValueError, match=r"x: got 6\.0"):
                    compiled(total, bad)
        assert seen == [1.0, 6.0, 6.0] * 5
        kernel = next(iter(add._decisions.values())).last.kernel
        assert not hasattr(kernel, "__wrapped__")  # so that it costs other calls nothing


def test_the_environment_asks_for_checks(add: Op[...], elsewhere: Callable[[], None], monkeypatch: Any) -> None:
    seen = []
    add.validate_values(lambda x: seen.append(x.shape))
    elsewhere()
    call(add)
    assert not seen
    monkeypatch.setenv("TOYS_CHECK", "1")
    registry.dispatcher.dispatcher._environments.clear()
    registry.dispatcher.dispatcher.changed()
    call(add)
    call(add)
    assert len(seen) == 2


@pytest.fixture
def elsewhere(monkeypatch: Any) -> Callable[[], None]:
    """Returns what makes the op take its tensors to be on a device that is no CPU."""

    def move() -> None:
        monkeypatch.setattr(op_module, "device_of", lambda arguments: SimpleNamespace(type="elsewhere"))
        monkeypatch.setattr(op_module, "capture_query", lambda device: bool)
        registry.dispatcher.dispatcher.changed()

    return move
