"""What users call besides ops and layers: each argument that it cannot have is named, in a sentence."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamba_ops
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn
from mamba_ops.compat.transformers import use_mamba_ops
from mamba_ops.layers import Mamba2
from mamba_ops.registry.errors import ArgumentTypeError, RegistryError
from mamba_ops.serving import PiecewiseRunner, Plan, StatePool


class Model(nn.Module):
    """One layer on caches of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Mamba2(16, heads=2, head_dim=8, dstate=4, chunk_size=4)
        self.caches = self.layer.empty_caches(4)

    def forward(self, x: Tensor, plan: Plan) -> Tensor:
        return x + self.layer(x, *self.caches, plan=plan)


def runner(model: Any = None, **options: Any) -> PiecewiseRunner:
    given = {"max_tokens": 8, "max_requests": 4, "capture_sizes": (1, 4), "compile_piece": "eager"}
    return PiecewiseRunner(Model() if model is None else model, **{**given, **options})


def plan_of(tokens: int) -> Plan:
    return Plan.of([0], [tokens], [0], max_requests=4)


CONV = mamba_ops.causal_conv1d_update
X = torch.zeros(3, 16)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "caches": (lambda: Model().layer.empty_caches(-1), "Mamba2: slots: got -1, expected 0 at least"),
    "caches of text": (lambda: Model().layer.empty_caches("x"), "Mamba2: slots: got 'x', expected a whole number"),
    "cache dtype": (lambda: Model().layer.empty_caches(1, dtype=torch.int8), "Mamba2: dtype: got torch.int8, expected"),
    "state dtype": (lambda: Model().layer.empty_caches(1, state_dtype="x"), "Mamba2: state_dtype: got 'x', expected"),
    "pool": (lambda: StatePool(None, 3), "StatePool: templates: got a NoneType, expected a mapping"),
    "pool of a tensor": (lambda: StatePool({"a": X}, 3), "StatePool: templates: got a Tensor for 'a', expected"),
    "pool of scalars": (lambda: StatePool({"a": (torch.zeros(()),)}, 3), "StatePool: templates: got a tuple for 'a'"),
    "pool of layers": (lambda: StatePool.of([1], slots=3), "StatePool: layers: got a list, expected a mapping"),
    "pool of a number": (lambda: StatePool.of({"a": 1}, slots=3), "StatePool: layers: got a int for 'a', expected"),
    "plan of no tokens": (lambda: Plan.zeros(None), "Plan: tokens: got None, expected a whole number"),
    "plan of fewer": (lambda: Plan.zeros(-1), "Plan: tokens: got -1, expected 0 at least"),
    "plan of columns": (lambda: Plan.zeros(1, columns=0), "Plan: columns: got 0, expected 1 at least"),
    "plan there": (lambda: Plan.zeros(1, device="x"), "Plan: device: got 'x', expected a device"),
    "plan where": (lambda: Plan.of([0], [1], [0], device="x"), "Plan: device: got 'x', expected a device"),
    "no model": (lambda: runner(model=3), "PiecewiseRunner: model: got a int, expected a module or a function"),
    "runner tokens": (lambda: runner(max_tokens="x"), "PiecewiseRunner: max_tokens: got 'x', expected a whole number"),
    "runner requests": (lambda: runner(max_requests=None), "PiecewiseRunner: max_requests: got None, expected"),
    "runner sizes": (lambda: runner(capture_sizes=5), "PiecewiseRunner: capture_sizes: got 5, expected a sequence"),
    "runner size": (lambda: runner(capture_sizes=("a",)), "PiecewiseRunner: capture_sizes: got 'a', expected a whole"),
    "runner piece": (lambda: runner(compile_piece=3), "PiecewiseBackend: compile_piece: got a int, expected"),
    "step without plan": (lambda: runner()(None, X), "PiecewiseRunner: plan: got a NoneType, expected a mamba_ops"),
    "step without input": (lambda: runner()(plan_of(3), None), "PiecewiseRunner: inputs: got a NoneType, expected"),
    "step elsewhere": (lambda: runner()(plan_of(3), X.to("meta")), "PiecewiseRunner: inputs: got a .* on meta, exp"),
    "step sparse": (lambda: runner()(plan_of(3), X.to_sparse()), "PiecewiseRunner: inputs: got .*sparse.*, expected"),
    "no module": (lambda: use_mamba_ops("x"), "use_mamba_ops: model: got a str, expected a module"),
    "explain nothing": (lambda: mamba_ops.explain(None), "explain: op: got a NoneType, expected an op or its name"),
    "explain no call": (lambda: mamba_ops.explain(CONV), "mamba_ops::causal_conv1d_update: missing .* 'x'"),
    "explain None": (lambda: mamba_ops.explain(CONV, None, None, None), "mamba_ops::causal_conv1d_update: x: got None"),
    "backend of an op": (lambda: mamba_ops.use_backend(selective_scan=3), "use_backend: selective_scan: got 3, exp"),
    "an op": (lambda: CONV(X), r"causal_conv1d_update\(\) missing 2 required .* 'conv_state' and 'weight'"),
    "an op's argument": (lambda: CONV(X, X, X, none=1), r"causal_conv1d_update\(\) got an unexpected .* 'none'"),
    "a layer": (lambda: Model().layer(), r"Mamba2\(\) missing 1 required positional argument: 'hidden_states'"),
    "a layer's argument": (lambda: Model().layer(X, none=1), r"Mamba2\(\) got an unexpected keyword argument 'none'"),
    "compat": (causal_conv1d_fn, r"causal_conv1d_fn\(\) missing 2 required positional arguments: 'x' and 'weight'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_it_says_what_is_wrong(wrong: str) -> None:
    call, said = WRONG[wrong]
    with pytest.raises((ValueError, TypeError, RegistryError)) as found:
        call()
    assert re.match(said, str(found.value)), str(found.value)
    assert isinstance(found.value, ArgumentTypeError | ValueError | RegistryError) or "() " in str(found.value)


def test_a_runner_goes_on_after_a_first_step_that_failed() -> None:
    """What the model did not take then says nothing about later inputs."""
    run = runner()
    with pytest.raises(Exception, match=r"shape|size"):
        run(plan_of(3), torch.zeros(3, 15))
    assert run(plan_of(3), X).shape == X.shape
    with pytest.raises(ValueError, match="as in the first step"):
        run(plan_of(3), torch.zeros(3, 15))
