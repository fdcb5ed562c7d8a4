"""use_mamba_ops and norms of every kind: what is known as one of the op's forms, and what keeps its own code."""

import time
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="the kernel is Triton's")

from mamba_ops.compat.transformers import use_mamba_ops
from tests.compat_norms import (
    ONE_CALL,
    OP,
    OWN,
    SIZE,
    Clamped,
    Dropping,
    Gated,
    GatedAfter,
    Norm,
    OfRows,
    OnePlus,
    Raising,
    inputs,
    runs,
)
from tests.transformers_models import new_model

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model(device: torch.device) -> Any:
    return new_model("mamba2", device)


@pytest.mark.parametrize("name", ONE_CALL)
def test_norms_of_every_form_are_one_call(name: str, model: Any, device: torch.device) -> None:
    new, count = ONE_CALL[name]
    model.extra, given = new().to(device), inputs(device, count)
    stock, ran = runs(model.extra, *given)
    assert ran == []
    with use_mamba_ops(model) as binding:
        ours, ran = runs(model.extra, *given)
        [kind] = [kind for kind in type(model.extra).__mro__ if f"{kind.__module__}.{kind.__name__}" in binding.norms]
        assert binding.norms[f"{kind.__module__}.{kind.__name__}"] == 1
    assert ran == [OP]
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("name", OWN)
def test_what_computes_something_else_keeps_its_code(name: str, model: Any, device: torch.device) -> None:
    new, count = OWN[name]
    model.extra, given = new().to(device), inputs(device, count)
    kind, own = type(model.extra), type(model.extra).forward
    stock = model.extra.eval()(*given)
    with use_mamba_ops(model) as binding:
        assert kind.forward is own
        assert not [name for name in binding.norms if "modeling_" not in name]
        ours, ran = runs(model.extra, *given)
    assert ran == []
    torch.testing.assert_close(ours, stock, rtol=0, atol=0)


def test_reasons(model: Any, device: torch.device) -> None:
    model.extra = nn.ModuleList([OnePlus(), Clamped(), Raising(), nn.Dropout(0.05), nn.RMSNorm(SIZE)])
    with use_mamba_ops(model) as binding:
        assert {name.rpartition(".")[2]: why for name, why in binding.not_bound.items()} == {
            "OnePlus": "it multiplies by 1 + weight, which is no argument of rms_norm",
            "Clamped": "it computes something else than rms_norm does",
            "Raising": "it computes something else than rms_norm does",
        }


def test_arguments_are_taken_by_name_too(model: Any, device: torch.device) -> None:
    model.extra, (x, gate) = Gated().to(device), inputs(device, 2)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {"x": x, "gate": gate}),
        ((x,), {"gate": gate}),
        ((x, None), {}),
        ((), {"x": x}),
    ]
    stock = [model.extra(*given, **named) for given, named in calls]
    with use_mamba_ops(model):
        for (given, named), of_stock in zip(calls, stock, strict=True):
            ours, ran = runs(model.extra, *given, **named)
            assert ran == [OP]
            torch.testing.assert_close(ours, of_stock)
        for wrong in ({"x": x, "gates": gate}, {"gate": gate}):
            with pytest.raises(TypeError):
                runs(model.extra, **wrong)
        with pytest.raises(TypeError):
            runs(model.extra, x, gate, gate)
        with pytest.raises(TypeError):
            runs(model.extra, x, x=x)


def test_what_has_changed_since_keeps_its_code(model: Any, device: torch.device) -> None:
    """Settings, the size of the weight, and classes that were not tried."""
    model.extra, (x, gate) = GatedAfter(n_groups=1, activation="silu").to(device), inputs(device, 2)
    with use_mamba_ops(model):
        assert runs(model.extra, x, gate)[1] == [OP]
        for name, other in (("activation", "sigmoid"), ("eps", 0.01), ("n_groups", 2)):
            was = getattr(model.extra, name)
            setattr(model.extra, name, other)
            ours, ran = runs(model.extra, x, gate)
            assert ran == []
            assert torch.equal(ours, model.extra(x, gate))
            with use_mamba_ops(model):
                assert runs(model.extra, x, gate)[1] == [OP]
            setattr(model.extra, name, was)
        derived = type("Derived", (GatedAfter,), {})(n_groups=1, activation="silu").to(device)
        assert runs(derived, x, gate)[1] == []
        other_size = GatedAfter(8, n_groups=1, activation="silu").to(device)
        assert runs(other_size, x[..., :8], gate[..., :8])[1] == []


def test_of_how_many_axes_hidden_states_are(model: Any, device: torch.device) -> None:
    model.extra = nn.ModuleList([Norm(), OfRows()]).to(device)
    (x,) = inputs(device, 1)
    with use_mamba_ops(model):
        for norm in model.extra:
            for rows in (x, x[0], x[:, :1], x[:1, 0]):
                ours, ran = runs(norm, rows)
                assert ran == [OP]
                assert ours.shape == rows.shape
            assert runs(norm, x[0, 0])[1] == []  # as no model calls one
        assert runs(model.extra[0], x[None])[1] == [OP]
        with pytest.raises(ValueError, match="four axes"):
            runs(model.extra[1], x[None])


def test_binding_touches_no_weights_and_no_random_numbers_and_is_quick(model: Any, device: torch.device) -> None:
    model.extra = nn.ModuleList([Dropping(), *(Norm(2048 + 16 * number) for number in range(8))]).to(device)
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.named_parameters()}
    state = torch.get_rng_state()
    started = time.perf_counter()
    with use_mamba_ops(model) as binding:
        assert time.perf_counter() - started < 0.5
        assert binding.norms[f"{Norm.__module__}.Norm"] == 8
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter._version == before[name][1]
        assert parameter.grad is None


def test_a_model_on_the_meta_device_is_bound(device: torch.device) -> None:
    model = new_model("mamba2", "meta")
    with use_mamba_ops(model) as binding:
        assert len(binding.norms) == 2
