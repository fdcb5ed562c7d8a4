"""Ops that record gradients: what autograd, torch.compile and torch.func make of an op with the training facets."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from mamba_ops.registry import (
    DeclarationError,
    Namespace,
    NoBackendError,
    Op,
    explain,
    flop_formulas,
    record_selections,
    require_out,
    use_backend,
)

double = torch.double


def _new(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@pytest.fixture
def scale(toys: Namespace) -> Op[...]:
    """x * w * k + b; the cache gets the sums of the rows."""

    @toys.op(mutates=("cache", "out"))
    def scale(
        x: Tensor,
        w: Tensor,
        b: Tensor | None = None,
        *,
        cache: Tensor | None = None,
        k: float = 2.0,
        out: Tensor | None = None,
    ) -> Tensor:
        output = require_out(out)
        output.copy_(x * w * k + (0 if b is None else b))
        if cache is not None:
            cache.copy_(output.sum(-1))
        return output

    @scale.validate
    def _validate(x: Tensor, w: Tensor) -> None:
        if x.shape[-1:] != w.shape:
            raise ValueError(f"w: got shape {tuple(w.shape)}")

    scale.allocate_output(_new)

    @scale.training(
        differentiable=("x", "w", "b"),
        results={"output": _new, "sums": lambda x: x.new_empty(x.shape[:-1]), "doubled": _new},
        saves=("doubled",),
        batched=("x",),
    )
    def _forward(
        x: Tensor,
        w: Tensor,
        b: Tensor | None = None,
        k: float = 2.0,
        *,
        output: Tensor,
        sums: Tensor | None,
        doubled: Tensor,
    ) -> None:
        scale.call_undispatched(x, w, b, k=k, cache=sums, out=output)
        torch.mul(x, k, out=doubled)

    @scale.backward
    def _backward(call: Any) -> None:
        grad = call.grad_output
        if call.grad_sums is not None:
            grad = grad + call.grad_sums.unsqueeze(-1)
        call.grad_x.copy_(grad * call.w * call.k)
        call.grad_w.copy_((grad * call.doubled).flatten(0, -2).sum(0))
        if call.b is not None:
            call.grad_b.copy_(grad.flatten(0, -2).sum(0))

    @scale.flops
    def _flops(x: Any, w: Any) -> tuple[int, int]:
        return x[0] * x[1], 7

    return scale


@pytest.fixture
def inputs() -> list[Tensor]:
    return [torch.randn(*shape, dtype=double, requires_grad=True) for shape in ((3, 4), (4,), (4,))]


def loss(op: Any, *inputs: Any) -> Tensor:
    return op(*inputs).sin().sum()


def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x * w * 2 + b


def test_gradients(scale: Op[...], inputs: list[Tensor]) -> None:
    assert torch.autograd.gradcheck(scale, inputs)
    assert torch.autograd.gradcheck(lambda *a: scale.forward_states_op(*a)[:2], inputs)
    assert torch.autograd.gradcheck(scale, inputs[:2])
    only_sums = torch.autograd.grad(scale.forward_states_op(*inputs)[1].sum(), inputs)
    assert torch.equal(only_sums[2], torch.full((4,), 3.0, dtype=double))


def test_the_companions_are_ordinary_ops(scale: Op[...], inputs: list[Tensor], backend: Any) -> None:
    forward, states, backward = scale.forward_op, scale.forward_states_op, scale.backward_op
    assert forward.schema == "(Tensor x, Tensor w, Tensor? b, float k, Tensor? selection=None) -> (Tensor, Tensor)"
    assert states.returns == ("output", "sums", "doubled")
    assert "Tensor grad_output, Tensor? grad_sums, Tensor x" in backward.schema
    vendor = backend("vendor", priority=-1)

    @vendor.implements(backward, unsupported=lambda x: "takes one row" if x.shape[0] > 1 else None)
    def _kernel(call: Any) -> None:
        for gradient in (call.grad_x, call.grad_w, call.grad_b):
            gradient.fill_(7.0)

    one = inputs[0][:1].detach().requires_grad_()
    assert float(torch.autograd.grad(loss(scale, one, *inputs[1:]), one)[0][0, 0]) != 7.0
    with use_backend("vendor"), record_selections() as runs:
        assert float(torch.autograd.grad(loss(scale, one, *inputs[1:]), one)[0][0, 0]) == 7.0
        with pytest.raises(NoBackendError, match="takes one row"):
            loss(scale, *inputs).backward()
    assert [run.op for run in runs][:3] == ["toys::scale_forward", "toys::scale", "toys::scale_backward"]
    with torch.no_grad():
        assert explain(forward, *inputs).backend == "composed"
    with pytest.raises(ValueError, match=r"toys::scale_forward: w: got shape \(3,\)"):
        scale(inputs[0], inputs[1][:3])
    with torch.no_grad(), pytest.raises(ValueError, match=r"grad_output: got shape \(2, 4\), expected \(3, 4\)"):
        backward(inputs[0][:2], None, *inputs, 2.0, inputs[0])


def test_backward_runs_as_the_forward_did(scale: Op[...], inputs: list[Tensor], backend: Any) -> None:
    """Whatever is selected when it runs; but `use_backend` around it decides."""
    vendor = backend("vendor", priority=-1)
    vendor.implements(scale.backward_op)(lambda call: [g.fill_(7.0) for g in (call.grad_x, call.grad_w, call.grad_b)])
    with use_backend("vendor"):
        first, second = loss(scale, *inputs), loss(scale, *inputs)
    assert float(torch.autograd.grad(first, inputs[0])[0][0, 0]) == 7.0
    with use_backend("torch"):
        assert float(torch.autograd.grad(second, inputs[0])[0][0, 0]) != 7.0


@pytest.mark.parametrize("op", ["forward_op", "forward_states_op", "backward_op"])
def test_opcheck(scale: Op[...], inputs: list[Tensor], op: str) -> None:
    companion = getattr(scale, op)
    args = (*inputs, 2.0)
    if op == "backward_op":
        args = (inputs[0].detach(), None, *(t.detach() for t in inputs), 2.0, inputs[0].detach())
    torch.library.opcheck(companion.overload, args)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled(scale: Op[...], backend: Any) -> None:
    """One graph each way for four lengths and a swap; the backward runs as the forward did."""
    vendor = backend("vendor", priority=-1)
    vendor.implements(scale.backward_op)(lambda call: [g.fill_(7.0) for g in (call.grad_x, call.grad_w, call.grad_b)])
    compiled = torch.compile(lambda *a: loss(scale, *a), fullgraph=True, dynamic=True, backend="aot_eager")
    w, b = (torch.randn(4, dtype=double, requires_grad=True) for _ in range(2))
    for rows in (5, 7, 11, 13):
        x = torch.randn(rows, 4, dtype=double, requires_grad=True)
        for got, expected in zip(
            *(torch.autograd.grad(f(x, w, b), (x, w, b)) for f in (compiled, lambda *a: loss(scale, *a))), strict=True
        ):
            assert torch.equal(got, expected)
        with use_backend("vendor"):
            value = compiled(x, w, b)
            assert float(torch.autograd.grad(value, x)[0][0, 0]) == 7.0
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


def test_torch_func(scale: Op[...], inputs: list[Tensor]) -> None:
    x, w, b = (t.detach() for t in inputs)
    gradient = torch.func.grad(lambda x: loss(scale, x, w, b))(x)
    assert torch.allclose(gradient, torch.func.grad(lambda x: loss(plain, x, w, b))(x))
    xs = torch.randn(3, 5, 4, dtype=double)
    folded = torch.func.vmap(lambda x: scale(x, w, b), in_dims=1, out_dims=1)(xs)
    assert torch.equal(folded, plain(xs, w, b))
    with pytest.raises(ValueError, match=r"toys::scale: w: got a tensor that torch.func.vmap maps over"):
        torch.func.vmap(lambda w: scale(x, w, b))(torch.randn(5, 4, dtype=double))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_gradients_of_each_row(scale: Op[...], inputs: list[Tensor]) -> None:
    _, w, b = (t.detach() for t in inputs)
    xs = torch.randn(5, 3, 4, dtype=double)
    got, expected = (
        torch.func.vmap(torch.func.grad(lambda w, x: loss(op, x, w, b)), in_dims=(None, 0))(w, xs)  # noqa: B023
        for op in (scale, plain)
    )
    assert torch.allclose(got, expected)


def test_what_there_is_no_formula_for_raises(scale: Op[...], inputs: list[Tensor]) -> None:
    """Never zeros."""
    x, w, b = inputs
    ones = torch.ones_like(x)
    forward_mode = pytest.raises(NotImplementedError, match="toys::scale: got a call under forward-mode")
    with forward_mode:
        torch.func.jvp(lambda x: scale(x, w.detach(), b.detach()), (x.detach(),), (ones,))
    with forward_mode:
        gradient = torch.func.grad(lambda x: loss(scale, x, w.detach(), b.detach()))
        torch.func.jvp(gradient, (x.detach(),), (ones,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), ones)
        for weight in (w, w.detach()):
            with forward_mode:
                scale(dual, weight, b)
    (gradient,) = torch.autograd.grad(loss(scale, x, w, b), x, create_graph=True)
    assert torch.allclose(gradient, torch.autograd.grad(loss(plain, x, w, b), x)[0])
    with pytest.raises(RuntimeError, match="toys::scale: its gradient was differentiated again"):
        (loss(scale, x, w, b) + gradient.sum()).backward()
    with pytest.raises(RuntimeError, match="toys::scale: its gradient was differentiated again"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: loss(scale, x, w, b))(x).sum())(x.detach())
    with pytest.raises(ValueError, match=r"scale_backward: grad_output: got .* does not record gradients; call it"):
        scale.backward_op(x, None, x, w, b, 2.0, x)


def test_other_tensors_are_refused(scale: Op[...], inputs: list[Tensor]) -> None:
    out, cache = torch.empty(3, 4, dtype=double), torch.empty(3, dtype=double)
    sentence = r"toys::scale: x: got .* where no other tensors are given than x, w, b; .* toys.functional.scale; else"
    for kwargs in ({"out": out}, {"cache": cache}):
        for call in (scale, torch.compile(lambda *a, **k: scale(*a, **k), fullgraph=True, backend="aot_eager")):
            with pytest.raises(ValueError, match=sentence):
                call(*inputs, **kwargs)
    with torch.no_grad():
        scale(*inputs, out=out, cache=cache)
    assert torch.equal(cache, out.sum(-1))


def test_no_grad_runs_the_op_itself(scale: Op[...], inputs: list[Tensor]) -> None:
    with record_selections() as runs:
        with torch.no_grad():
            assert not scale(*inputs).requires_grad
        scale(*(t.detach() for t in inputs))
    assert [run.op for run in runs] == ["toys::scale"] * 2


def test_flops(scale: Op[...], inputs: list[Tensor]) -> None:
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        loss(scale, *inputs).backward()
    assert counter.get_total_flops() == 12 + 7


def test_wrong_declarations(toys: Namespace, scale: Op[...]) -> None:
    with pytest.raises(DeclarationError, match="names y, which the function does not have"):
        scale.training(differentiable=("y",), results={"output": _new})(lambda x, *, output: None)

    @toys.op()
    def other(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        return require_out(out)

    with pytest.raises(DeclarationError, match=r"declare @op\.training first"):
        other.backward(lambda call: None)


@pytest.fixture
def shifted(toys: Namespace, scale: Op[...]) -> Op[...]:
    """scale(x, w) + s; composed, with what records it."""

    @toys.op(mutates=("cache", "out"), composed=True)
    def shifted(
        x: Tensor, w: Tensor, *, s: float = 0.0, cache: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        output = require_out(out)
        output.copy_(scale.call_undispatched(x, w, cache=cache) + s)
        return output

    shifted.allocate_output(_new)
    with pytest.raises(DeclarationError, match=r"recorded_as .*: names shift, which the op does not have"):
        shifted.recorded_as(lambda x, shift: x)

    @shifted.recorded_as
    def _recorded(x: Tensor, w: Tensor, *, s: float = 0.0) -> Tensor:
        result: Tensor = scale.forward_op(x, w)[0] + s
        return result

    return shifted


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_composed_op_records_as_what_it_is_made_of(shifted: Op[...], inputs: list[Tensor]) -> None:
    x, w, *_ = inputs
    expected = torch.autograd.grad((x * w * 2 + 3).sin().sum(), (x, w))
    traced = torch.compile(lambda x, w: shifted(x, w, s=3.0), fullgraph=True, backend="aot_eager")
    for call in (lambda x, w: shifted(x, w, s=3.0), traced):
        torch.testing.assert_close(torch.autograd.grad(call(x, w).sin().sum(), (x, w)), expected)
    assert counters["stats"]["unique_graphs"] == 1
    with record_selections() as runs, torch.no_grad():
        torch.testing.assert_close(shifted(x, w, s=3.0), x * w * 2 + 3)
    assert "toys::shifted" in [run.op for run in runs]
    sentence = r"toys::shifted: x: got .* where no other tensors are given than x, w; .* toys.functional.shifted; else"
    for call in (shifted, torch.compile(lambda *a, **k: shifted(*a, **k), fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=sentence):
            call(x, w, cache=torch.empty(3, dtype=double))
