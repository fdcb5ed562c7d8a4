"""How a backward pass is judged: the gradient of every input against autograd of the op's sequential oracle."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import Op
from tests.harness import operands_of
from tests.test_mutants import changed
from tests.training.gradients import assert_gradients, oracle_forward, slip_of

Arguments = Mapping[str, Any]
Oracle = Callable[..., tuple[Tensor, Tensor]]
"""From the inputs by name to (output, final states), in their one dtype."""
Backward = Callable[[Arguments], dict[str, Tensor]]
"""From the inputs, `grad_output` and `grad_final_states` by name to the gradients of the inputs that are there."""

RESULTS = ("grad_output", "grad_final_states")


def oracle_by_name(op: Op[...]) -> Oracle:
    """The op's sequential oracle, of the inputs of its forward companion by name."""

    def run(operands: torch.dtype | None = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        dtype = next(t.dtype for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point())
        return oracle_forward(op, inputs, dtype, operands=operands)

    return run


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
    """The gradients by autograd of the oracle in `dtype`; rounded to their inputs' dtypes, but for float64.

    In float32 an oracle that knows how rounds what kernels round on their way (see OPERANDS).
    """
    call = converted(arguments, dtype)
    names = differentiated(arguments)
    inputs = {name: call[name].clone().requires_grad_() for name in names}
    others = {name: value for name, value in call.items() if name not in (*names, *RESULTS)}
    if dtype == torch.float32:
        others["operands"] = operands_of(arguments)
    results = zip(oracle(**inputs, **others), (call[name] for name in RESULTS), strict=True)
    loss = sum((result * grad).sum() for result, grad in results if grad is not None)
    found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    exact = dtype == torch.float64
    return {n: g if exact else g.to(arguments[n].dtype) for n, g in zip(names, found, strict=True)}


def judge(backward: Backward, oracle: Oracle, arguments: Arguments) -> None:
    """Raise AssertionError unless every gradient is within the error budget. The oracle runs on the CPU."""
    gradients = backward(arguments)
    arguments = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    truth, low = (expected(oracle, arguments, dtype) for dtype in (torch.float64, torch.float32))
    assert set(gradients) == set(truth)
    assert_gradients(gradients, truth, slip_of(truth, low), "gradient of")


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


def packed(*ends: int, dtype: torch.dtype = torch.int32, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The arguments that make rows of packed tokens: where these end, and how many there are."""
    return {"cu_seqlens": torch.tensor((0, *ends), dtype=dtype, device=device), "rows": len(ends)}


def check_rows(run: Backward, arguments: Arguments, tokens: Sequence[str]) -> None:
    """Rows alone, and twice, have the same gradients bit for bit; tokens of no row have none.

    `tokens` names the inputs of which packed rows have their own parts.
    """
    together, again = run(arguments), run(arguments)
    assert together
    for name, gradient in together.items():
        assert torch.equal(gradient, again[name]), name
    ends = arguments["cu_seqlens"].tolist()
    for name in tokens:
        assert together[name][: ends[-1]].count_nonzero() > 0
        assert together[name].shape[0] > ends[-1]
        assert together[name][ends[-1] :].count_nonzero() == 0
    for row, (low, high) in enumerate(pairwise(ends)):
        own = {name: arguments[name][low:high] for name in (*tokens, "grad_output")}
        own |= {name: arguments[name][row : row + 1] for name in ("initial_states", "grad_final_states")}
        alone = run({**arguments, **own, "cu_seqlens": arguments["cu_seqlens"].new_tensor([0, high - low])})
        for name in tokens:
            assert torch.equal(together[name][low:high], alone[name]), (row, name)
        assert torch.equal(together["initial_states"][row], alone["initial_states"][0])


def check_halves(run: Backward, oracle: Oracle, whole: Arguments, tokens: Sequence[str], at: int) -> None:
    """Dense rows cut after `at` tokens: the gradient of the second half's initial state, given to the first half as
    that of its final state, makes the gradients of the whole.
    """
    own = (*tokens, "grad_output")
    first, second = (
        {name: t[:, part] if name in own else t for name, t in whole.items()}
        for part in (slice(None, at), slice(at, None))
    )
    _, between = oracle(**{name: value for name, value in first.items() if name not in RESULTS})
    later = run({**second, "initial_states": between})
    earlier = run({**first, "grad_final_states": later["initial_states"]})
    for name, gradient in run(whole).items():
        if name in tokens:
            halves = torch.cat([earlier[name], later[name]], 1)
        else:
            halves = earlier[name] if name == "initial_states" else earlier[name] + later[name]
        torch.testing.assert_close(halves, gradient, msg=lambda m, name=name: f"{name}: {m}")


def check_no_tokens(run: Backward, arguments: Arguments, tokens: Sequence[str]) -> None:
    gradients = run(arguments)
    assert arguments["grad_output"].numel() == 0
    assert torch.equal(gradients["initial_states"], arguments["grad_final_states"])
    for name in set(gradients) - {"initial_states", *tokens}:
        assert gradients[name].count_nonzero() == 0


def caught(run: Backward, oracle: Oracle, calls: Iterable[Arguments]) -> bool:
    """Whether some call is outside the error budget: what a planted bug must do."""
    for arguments in calls:
        try:
            judge(run, oracle, arguments)
        except AssertionError:
            return True
    return False


def mutant_of(module: ModuleType, bug: tuple[str, str]) -> dict[str, Any]:
    """What is in a module of plain torch after one piece of its text became another."""
    scope: dict[str, Any] = {"__name__": module.__name__}
    exec(compile(changed(inspect.getsource(module), bug), "mutant.py", "exec"), scope)
    return scope
