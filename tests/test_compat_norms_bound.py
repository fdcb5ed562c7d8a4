"""use_mamba_ops and norms: where they are one call of the op, what users do to them, and how it ends."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("triton", reason="the kernel is Triton's")

import mamba_ops
from mamba_ops.cold_start.layers import layers_of
from mamba_ops.compat.transformers import use_mamba_ops
from mamba_ops.compat.transformers_norms import bound_form
from tests.compat_norms import FORCED, OP, Around, Inheriting, Norm, inputs, runs
from tests.transformers_models import new_model

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model(device: torch.device) -> Any:
    return new_model("mamba2", device)


# -- where they are one call ------------------------------------------------------------------------------------------


def norms_of(model: Any) -> list[str]:
    tokens = torch.randint(3, 64, (1, 9), device=model.device)
    return [op for op in runs(model, tokens, use_cache=False)[1] if op == OP]


def test_where_gradients_are_recorded_norms_are_the_models(model: Any) -> None:
    with use_mamba_ops(model):
        assert norms_of(model)
        with torch.enable_grad():
            assert norms_of(model) == []
            assert norms_of(model.train()) == []
        assert norms_of(model)  # in train() too, if nothing is recorded
        with torch.inference_mode():
            assert norms_of(model)


def test_training_is_that_of_stock(model: Any, device: torch.device) -> None:
    tokens = torch.randint(3, 64, (2, 9), device=device)

    def gradients() -> list[Tensor]:
        with torch.enable_grad(), mamba_ops.use_backend(**FORCED):
            loss = model(tokens, labels=tokens, use_cache=False).loss
            return list(torch.autograd.grad(loss, list(model.parameters())))

    with use_mamba_ops(model):
        ours = gradients()
    for of_ours, of_stock in zip(ours, gradients(), strict=True):
        torch.testing.assert_close(of_ours, of_stock, rtol=1e-4, atol=1e-6)


def test_in_compiled_exported_and_traced_programs_norms_are_the_models(
    model: Any, device: torch.device, fresh_dynamo: None
) -> None:
    norm, (x, gate) = model.backbone.layers[0].mixer.norm, torch.randn(2, 2, 3, 64, device=device)
    with use_mamba_ops(model):
        stock = norm(x, gate) if device.type == "cpu" else None
        assert runs(norm, x, gate)[1] == [OP]
        compiled = torch.compile(norm, fullgraph=True, backend="eager")
        ours, ran = runs(compiled, x, gate)
        assert ran == []
        assert stock is None or torch.equal(ours, stock)
        for strict in (False, True):
            exported = torch.export.export(norm, (x, gate), strict=strict)
            assert not [n for n in exported.graph.nodes if "mamba_ops" in str(n.target)]
        traced, ran = runs(lambda: torch.jit.trace(norm, (x, gate), check_trace=False))
        assert ran == []
        assert "mamba_ops::" not in str(traced.graph)
    assert runs(norm, x, gate)[1] == []


class Answering(Tensor):
    """A class with operators of its own."""


def test_tensors_of_other_kinds_keep_the_models_norms(model: Any, device: torch.device) -> None:
    norm, x = model.backbone.norm_f, torch.randn(2, 3, 32, device=device)
    with use_mamba_ops(model):
        assert runs(norm, x)[1] == [OP]
        assert runs(norm, x.as_subclass(Answering))[1] == []
        norm.weight = nn.Parameter(norm.weight.double())
        assert runs(norm, x)[1] == []
        assert runs(norm.float(), x.double())[1] == []
        assert runs(norm, x[..., :0, :])[0].shape == (2, 0, 32)
        with pytest.raises(RuntimeError):
            runs(norm, x[..., :31])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="about CPUs")
def test_on_a_cpu_norms_are_the_models(model: Any) -> None:
    """By default, bit by bit."""
    norms, x = [model.backbone.norm_f, model.backbone.layers[0].norm], torch.randn(2, 3, 32)
    stock = [norm(x) for norm in norms]
    with use_mamba_ops(model), mamba_ops.record_selections() as record:
        assert all(torch.equal(norm(x), of_stock) for norm, of_stock in zip(norms, stock, strict=True))
    assert record == []


def test_warm_ups_call_norms_beside_mixers(model: Any) -> None:
    """And take no model for warm of which they know the norms alone."""
    assert layers_of(model) == []
    with use_mamba_ops(model):
        names = [layer.name for layer in layers_of(model)]
        assert names == ["backbone.layers.0.norm", "backbone.layers.0.mixer"]  # the last norm is like the first
    convolutional = new_model("lfm2", "cpu")
    with use_mamba_ops(convolutional) as binding:
        assert binding.norms
        assert layers_of(convolutional) == []


# -- what users do to them --------------------------------------------------------------------------------------------


def test_bindings_of_several_models_and_classes_that_they_share(model: Any, device: torch.device) -> None:
    """A class that is neither file's is held by both models, until the last is undone, in either order."""
    other, (x,) = new_model("jamba", device), inputs(device, 1)
    model.extra, other.extra = Norm().to(device), Norm().to(device)
    own, of_file = Norm.forward, type(model.backbone.norm_f).forward
    for first_undone in (0, 1):
        bindings = [use_mamba_ops(model), use_mamba_ops(other)]
        again = use_mamba_ops(model)
        assert runs(model.extra, x)[1] == runs(other.extra, x)[1] == [OP]
        again.undo()
        bindings[first_undone].undo()
        assert runs(model.extra, x)[1] == runs(other.extra, x)[1] == [OP]
        bindings[1 - first_undone].undo()
        bindings[first_undone].undo()  # a second time it does nothing
        assert (Norm.forward, type(model.backbone.norm_f).forward) == (own, of_file)
        assert runs(model.extra, x)[1] == []


def test_a_class_and_one_that_is_derived_from_it(model: Any, device: torch.device) -> None:
    """Each is what it computes: the derived one's call of its base is not taken for the base."""
    (x,) = inputs(device, 1)
    model.extra = nn.ModuleList([Norm(), Inheriting(), Around()]).to(device)
    stock = [norm(x) for norm in model.extra]
    with use_mamba_ops(model) as binding:
        assert binding.norms[f"{Norm.__module__}.Norm"] == 2
        ours, ran = zip(*(runs(norm, x) for norm in model.extra), strict=True)
    assert ran == ([OP], [OP], [])
    torch.testing.assert_close(list(ours), stock)


def test_derived_classes_as_of_fsdp(model: Any, device: torch.device) -> None:
    def no_new(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("made anew")

    norm, x = model.backbone.norm_f, torch.randn(2, 3, 32, device=device)
    norm.__class__ = type("Sharded", (type(norm),), {"__new__": no_new})
    with use_mamba_ops(model) as binding:
        assert runs(norm, x)[1] == [OP]
        assert sum(count for name, count in binding.norms.items() if name.endswith("Mamba2RMSNorm")) == 3


def test_copies_and_pickles_are_what_they_are_copies_of(model: Any, device: torch.device) -> None:
    x = torch.randn(2, 3, 32, device=device)
    with use_mamba_ops(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            norm = twin.backbone.norm_f
            norm.weight.fill_(0)
            ours, ran = runs(norm, x)
            assert ran == [OP]
            assert not ours.any()
        assert runs(model.backbone.norm_f, x)[0].any()
    assert runs(norm, x)[1] == []
    assert "mamba_ops" not in str(pickle.dumps(model))


def test_hooks_run(model: Any, device: torch.device) -> None:
    norm, x, seen = model.backbone.norm_f, torch.randn(2, 3, 32, device=device), []
    norm.register_forward_pre_hook(lambda m, given: (given[0] * 0,))
    norm.register_forward_hook(lambda m, given, out: seen.append(out))
    with use_mamba_ops(model):
        ours, ran = runs(norm, x)
    assert ran == [OP]
    assert seen[0] is ours
    assert not ours.any()


def test_a_forward_of_a_modules_own_is_left_alone(model: Any, device: torch.device) -> None:
    """As hooks of accelerate have it, which may bring the weight first: no call goes past it."""
    norm, x = model.backbone.norm_f, torch.randn(2, 3, 32, device=device)
    stock = norm.forward
    norm.forward = before = lambda x: stock(x) * 2
    with use_mamba_ops(model) as binding:
        assert vars(norm)["forward"] is before
        ours, ran = runs(norm, x)
        assert ran == []
        assert [why for name, why in binding.not_bound.items() if name.endswith("Mamba2RMSNorm")] == [
            "its modules have a forward of their own"
        ]
        assert sum(count for name, count in binding.norms.items() if name.endswith("Mamba2RMSNorm")) == 2
    assert torch.equal(ours, stock(x) * 2)


def test_what_has_kept_a_bound_forward_has_the_models_own_afterwards(model: Any, device: torch.device) -> None:
    norm, x = model.backbone.norm_f, torch.randn(2, 3, 32, device=device)
    with use_mamba_ops(model):
        kept = norm.forward
        assert runs(kept, x)[1] == [OP]
    assert runs(kept, x)[1] == []


def test_a_forward_that_others_put_around_stays(
    model: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, x = type(model.backbone.norm_f), torch.randn(2, 3, 32, device=device)
    monkeypatch.setattr(kind, "forward", kind.forward)  # put back after the test
    with use_mamba_ops(model):
        inner = kind.forward
        kind.forward = around = lambda self, x: inner(self, x) * 2
    assert kind.forward is around
    assert runs(model.backbone.norm_f, x)[1] == []


def test_threads(model: Any, device: torch.device) -> None:
    norm, x, errors = model.backbone.norm_f, torch.randn(2, 3, 32, device=device), []
    own, want = type(norm).forward, norm(x)  # Triton's interpreter is for one thread

    def work() -> None:
        try:
            for _ in range(20):
                with torch.no_grad(), use_mamba_ops(model):
                    assert bound_form(norm) is not None
                    torch.testing.assert_close(norm(x), want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert type(norm).forward is own
    assert bound_form(norm) is None
