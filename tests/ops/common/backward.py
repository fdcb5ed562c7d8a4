"""How a backward pass is judged: the gradient of every input against autograd of the op's sequential oracle."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry.samples import assert_within_budget

Arguments = Mapping[str, Any]
Oracle = Callable[..., tuple[Tensor, Tensor]]
"""From the inputs by name to (output, final states), in their one dtype."""
Backward = Callable[[Arguments], dict[str, Tensor]]
"""From the inputs, `grad_output` and `grad_final_states` by name to the gradients of the inputs that are there."""

RESULTS = ("grad_output", "grad_final_states")


def converted(arguments: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    """The same call with its floating tensors in another dtype."""
    floating = {n: t for n, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {**arguments, **{name: tensor.to(dtype) for name, tensor in floating.items()}}


def differentiated(arguments: Arguments) -> list[str]:
    """The names of the inputs that have a gradient."""
    floating = [n for n, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point()]
    return [name for name in floating if name not in RESULTS]


def front_of(function: Callable[[Any], None], call: type[tuple[Any, ...]]) -> Backward:
    """A backward pass, which writes into tensors of its call, as a function that returns them; full of NaN before."""
    written = [name for name in call._fields if name.startswith("grad_") and name not in RESULTS]  # type: ignore[attr-defined]

    def front(arguments: Arguments) -> dict[str, Tensor]:
        inputs = {name: arguments[name.removeprefix("grad_")] for name in written}
        nothing = arguments["grad_output"].new_empty(0)
        gradients = {n: nothing if t is None else t.new_full(t.shape, torch.nan) for n, t in inputs.items()}
        function(call(**arguments, **gradients))
        return {n.removeprefix("grad_"): g for n, g in gradients.items() if inputs[n] is not None}

    return front


def expected(oracle: Oracle, arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients by autograd of the oracle in `dtype`; rounded to their inputs' dtypes, but for float64."""
    call = converted(arguments, dtype)
    names = differentiated(arguments)
    inputs = {name: call[name].clone().requires_grad_() for name in names}
    others = {name: value for name, value in call.items() if name not in (*names, *RESULTS)}
    results = zip(oracle(**inputs, **others), (call[name] for name in RESULTS), strict=True)
    loss = sum((result * grad).sum() for result, grad in results if grad is not None)
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    exact = dtype == torch.float64
    return {n: g if exact else g.to(arguments[n].dtype) for n, g in zip(names, found, strict=True)}


def judge(backward: Backward, oracle: Oracle, arguments: Arguments) -> None:
    """Raise AssertionError unless every gradient is within the error budget."""
    gradients = backward(arguments)
    truth, low = (expected(oracle, arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert set(gradients) == set(truth)
    for name, actual in gradients.items():
        assert_within_budget(actual.cpu(), truth[name], low[name], f"gradient of {name}")


def assert_gradcheck(backward: Backward, oracle: Oracle, arguments: Arguments) -> None:
    """Compare a backward pass in float64 with differences of the oracle's results, for all inputs at once."""
    call = converted(arguments, torch.float64)
    names = differentiated(call)
    others = {name: value for name, value in call.items() if name not in (*names, *RESULTS)}

    class Joined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(*inputs)
            return oracle(**dict(zip(names, inputs, strict=True)), **others)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            inputs = dict(zip(names, ctx.saved_tensors, strict=True))
            gradients = backward({**inputs, **others, **dict(zip(RESULTS, grads, strict=True))})
            return tuple(gradients[name] for name in names)

    inputs = [call[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(Joined.apply, inputs, nondet_tol=0.0)


def assert_equal(gradients: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless all gradients of two passes are equal bit for bit."""
    assert set(gradients) == set(others)
    for name, one in gradients.items():
        assert torch.equal(one, others[name]), name
