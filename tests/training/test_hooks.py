"""What others hook into: checkpointing policies, FLOPs, memory budgets, compiled autograd, autocast, profiles."""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import mamba_ops
from mamba_ops import layers, training
from mamba_ops.registry import Op, flop_formulas, record_selections, use_backend
from tests.training.gradients import TRAINED, activation, is_float
from tests.training.test_training import dense, leaves, loss

BY_NAME = pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
ONE_DAILY = pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[pytest.mark.slow] * (op.name != "mamba_chunk_scan")) for op in TRAINED], ids=str
)


def main_input(op: Op[...]) -> tuple[dict[str, Any], str]:
    """A call without gradients, and the name of its main input."""
    call = dense(op)
    main = next(name for name, value in call.items() if value is activation(call))
    return {n: v.detach() if is_float(v) else v for n, v in call.items()}, main


def names_of(runs: Any) -> list[str]:
    return [run.op.partition("::")[2] for run in runs]


# -- checkpointing ----------------------------------------------------------------------------------------------------


def test_the_list_of_ops_to_save() -> None:
    expected = {op.overload for t in TRAINED for op in (t.forward_op, t.forward_states_op)}
    assert expected <= set(training.save_ops())
    assert len(expected) == 2 * len(TRAINED) > 0
    assert all(op.returns for op in mamba_ops.registry.ops().values() if op.overload in training.save_ops())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@BY_NAME
def test_a_policy_may_be_that_list(op: Op[...], compiled: bool, fresh_dynamo: None) -> None:
    """Equal gradients, and what the op returned is kept: it runs once, though all around it is computed again."""
    call = dense(op)
    names, values = [n for n, v in call.items() if is_float(v)], leaves(call)

    def block(*values: Tensor) -> Tensor:
        return op(**{**call, **dict(zip(names, values, strict=True))}).sin()

    def run(*values: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, training.save_ops())
        return checkpoint(block, *values, use_reentrant=False, context_fn=contexts).sum()

    expected = torch.autograd.grad(loss(op, call), values)
    runner = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with record_selections() as runs:
        found = torch.autograd.grad(runner(*values), values)
    assert names_of(runs).count(op.forward_op.name) == names_of(runs).count(op.backward_op.name) == 1
    for got, truth in zip(found, expected, strict=True):
        assert torch.equal(got, truth)


# -- FLOPs, and what goes by them -------------------------------------------------------------------------------------


@BY_NAME
def test_a_flop_counter_knows_the_ops(op: Op[...]) -> None:
    call = dense(op)
    totals = []
    for mapping in ({}, flop_formulas()):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            loss(op, call).backward()
        totals.append(counter.get_flop_counts()["Global"])
    assert totals[0] == totals[1]
    packets = {c.overload.overloadpacket for c in (op.forward_op, op.backward_op)}
    assert packets <= set(totals[0])


@pytest.mark.usefixtures("fresh_dynamo")
@ONE_DAILY
def test_a_memory_budget(op: Op[...]) -> None:
    """The less may be kept, the more forwards run again; gradients stay equal.

    By default torch counts what is no op of its own as free to run again, whatever its formula says.
    """
    call = dense(op)
    main = next(n for n, v in call.items() if v is activation(call))
    values = leaves(call)

    def three(*_: Tensor) -> Tensor:
        x = call[main]
        for _ in range(3):
            x = op(**{**call, main: x}).sin()
        return x.sum()

    expected, forwards = torch.autograd.grad(three(), values), []
    for budget in (0.0, 0.4, 1.0):
        torch.compiler.reset()
        compiled = torch.compile(three, fullgraph=True, backend="aot_eager_decomp_partition")
        settings = {"activation_memory_budget": budget, "is_non_builtin_to_include": True}
        with torch._functorch.config.patch(settings), record_selections() as runs:
            found = torch.autograd.grad(compiled(*values), values)
        forwards.append(names_of(runs).count(op.forward_op.name))
        for got, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(got, truth)
    assert forwards[0] == 6 > forwards[1] > forwards[2] == 3


# -- compiled autograd ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing asks
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@ONE_DAILY
def test_compiled_autograd(op: Op[...], compiled: bool, fresh_dynamo: None) -> None:
    """The backward pass is one graph, and what it computes is what the eager pass does."""
    call = dense(op)
    expected = torch.autograd.grad(loss(op, call), leaves(call))
    counters.clear()
    run = torch.compile(partial(loss, op), fullgraph=True, backend="aot_eager") if compiled else partial(loss, op)
    one_graph = partial(torch.compile, backend="aot_eager", fullgraph=True)
    with compiled_autograd._enable(one_graph), record_selections() as runs:
        found = torch.autograd.grad(run(call), leaves(call))
    assert counters["compiled_autograd"]["captures"] == 1
    assert names_of(runs).count(op.backward_op.name) == 1
    for got, truth in zip(found, expected, strict=True):
        assert torch.equal(got, truth)


# -- precision --------------------------------------------------------------------------------------------------------


class _Dtypes(TorchDispatchMode):
    """The dtypes of the tensors that an op is called with."""

    def __init__(self, overload: Any) -> None:
        super().__init__()
        self.overload, self.seen = overload, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is self.overload:
            self.seen.append([a.dtype for a in args if isinstance(a, Tensor)])
        return function(*args, **(kwargs or {}))


@BY_NAME
def test_autocast_leaves_the_ops_alone(op: Op[...]) -> None:
    call = dense(op)
    expected = torch.autograd.grad(loss(op, call), leaves(call))
    with torch.autocast("cpu", torch.bfloat16), _Dtypes(op.forward_op.overload) as mode:
        found = torch.autograd.grad(loss(op, call), leaves(call))
    assert mode.seen == [[torch.float32] * len(leaves(call))]
    for got, truth in zip(found, expected, strict=True):
        assert torch.equal(got, truth)


def test_a_layer_under_autocast() -> None:
    """Activations come in bfloat16 from the projections; decays stay in float32, and so do parameters' gradients."""
    layer = layers.Mamba2(32, heads=4, head_dim=8, dstate=16, chunk_size=8)
    x = torch.randn(2, 12, 32)
    grads = []
    for enabled in (False, True):
        mode = _Dtypes(mamba_ops.mamba_chunk_scan.forward_op.overload)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), mode:
            y = layer(x)
        grads.append(torch.autograd.grad(y.float().square().mean(), list(layer.parameters())))
    ((of_x, of_dt, of_A, *_),) = mode.seen
    assert (of_x, of_dt, of_A) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for exact, got in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - exact).norm() < 0.05 * exact.norm()


@BY_NAME
def test_a_grad_scaler(op: Op[...]) -> None:
    """A power of two goes through the backward without a rounding; an overflow leaves the parameters as they were."""
    call = dense(op)
    expected = torch.autograd.grad(loss(op, call), leaves(call))
    call = {n: v.detach().requires_grad_() if is_float(v) else v for n, v in call.items()}
    optimizer, scaler = torch.optim.SGD(leaves(call), lr=0.125), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [leaf.detach().clone() for leaf in leaves(call)]
    scaler.scale(loss(op, call)).backward()
    scaler.unscale_(optimizer)
    for leaf, truth in zip(leaves(call), expected, strict=True):
        assert torch.equal(leaf.grad, truth)
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(leaf, old) for leaf, old in zip(leaves(call), before, strict=True))
    before = [leaf.detach().clone() for leaf in leaves(call)]
    optimizer.zero_grad()
    scaler.scale(loss(op, call) * 1e38).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves(call), before, strict=True))


# -- profiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@BY_NAME
def test_names_in_a_profile(op: Op[...], compiled: bool, fresh_dynamo: None) -> None:
    call = dense(op)
    run = torch.compile(partial(loss, op), fullgraph=True, backend="aot_eager") if compiled else partial(loss, op)
    run(call).backward()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:  # or torch 2.11 warns
        run(call).backward()
    counts = {event.key: event.count for event in found.key_averages()}
    assert counts[f"mamba_ops::{op.name}_forward"] == counts[f"mamba_ops::{op.name}_backward"] == 1
    assert compiled or counts[f"{op.name}Backward"] == 1  # the node of the graph of autograd


# -- torch.func and forward mode --------------------------------------------------------------------------------------


@BY_NAME
def test_no_tangent_is_lost(op: Op[...]) -> None:
    """Outside torch.func, under no_grad, which forward mode ignores, and in a call like the one before."""
    call, main = main_input(op)
    x = call[main]
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, forward_ad.dual_level():
            for _ in range(3):
                op(**call)
            with pytest.raises(NotImplementedError, match=f"{op.name}: got a call under forward-mode"):
                op(**{**call, main: forward_ad.make_dual(x, x)})
            op(**call)  # what carries no tangent is as ever
    with torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: op(**{**call, main: x}), (x,), (x,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.hessian(lambda x: loss(op, {**call, main: x}))(x)


def test_ops_without_gradients_lose_no_tangent_either() -> None:
    x, state, weight = torch.randn(2, 8), torch.zeros(2, 8, 3), torch.randn(8, 4)
    with torch.no_grad(), forward_ad.dual_level():
        for _ in range(3):
            mamba_ops.causal_conv1d_update(x, state, weight)
        dual = forward_ad.make_dual(x, x)
        for tensors in ((dual, state, weight), (x, state, forward_ad.make_dual(weight, weight))):
            with pytest.raises(NotImplementedError, match="causal_conv1d_update: got a call under forward-mode"):
                mamba_ops.causal_conv1d_update(*tensors)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # backwards run one by one: gradients of A are not summed
@BY_NAME
def test_vmap_is_folded_or_refused(op: Op[...]) -> None:
    call, main = main_input(op)
    x = call[main]
    rows = [n for n, v in call.items() if is_float(v) and v.shape[:2] == x.shape[:2]]
    stacked = {n: torch.stack((call[n], call[n].flip(0))) for n in rows}
    with torch.no_grad():
        mapped = torch.func.vmap(lambda rows: op(**{**call, **rows}))(stacked)
        assert torch.equal(mapped[1], op(**{**call, **{n: call[n].flip(0) for n in rows}}))
    each = torch.func.vmap(torch.func.grad(lambda rows: loss(op, {**call, **rows})))(stacked)
    one = torch.func.grad(lambda rows: loss(op, {**call, **rows}))({n: stacked[n][1] for n in rows})
    for name in rows:
        assert torch.equal(each[name][1], one[name]), name
    others = [n for n, v in call.items() if is_float(v) and n not in rows]
    for name in others:
        with pytest.raises(ValueError, match=f"{op.name}: {name}: got a tensor that torch.func.vmap maps over"):
            torch.func.vmap(lambda value, name=name: op(**{**call, name: value}))(torch.stack([call[name]] * 2))
    assert others or op.name in ("chunk_gated_delta_rule", "chunk_kda")


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x.expand(3, *x.shape)),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # what calls the op in the eager mode
@pytest.mark.parametrize("transform", [pytest.param(t, marks=[pytest.mark.slow] * (t != "jvp")) for t in TRANSFORMS])
@ONE_DAILY
def test_a_traced_transform_is_refused(op: Op[...], transform: str) -> None:
    """Never a tangent of zero. Where graphs may break, the transform runs in eager mode and does what it does there."""
    call, main = main_input(op)
    transformed = TRANSFORMS[transform](lambda x: loss(op, {**call, main: x}))
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{op.name}: got a call under a transform of torch.func"):
        compiled(call[main])
    if transform == "grad":
        broken = torch.compile(transformed, backend="aot_eager")
        assert torch.equal(broken(call[main]), transformed(call[main]))


# -- what a call without gradients costs ------------------------------------------------------------------------------


@BY_NAME
def test_a_call_without_gradients_asks_once_more(op: Op[...]) -> None:
    """In no_grad an op that records gradients asks for the grad mode, and else does what any op does."""
    call = {n: v.detach() if is_float(v) else v for n, v in dense(op).items()}
    out = torch.empty_like(activation(call))
    seen: list[str] = []

    def trace(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            seen.append(frame.f_code.co_filename)
        elif event == "c_call":
            seen.append(argument.__name__)

    with torch.no_grad(), use_backend("torch"):
        for _ in range(3):
            op(**call, out=out)
        sys.setprofile(trace)
        try:
            op(**call, out=out)
        finally:
            sys.setprofile(None)
    before_the_kernel = seen[: next(i for i, name in enumerate(seen) if "reference" in name or "wrappers" in name)]
    assert before_the_kernel.count("is_grad_enabled") <= 1
    assert not any("gradients.py" in name or "training.py" in name for name in before_the_kernel)
    assert len(before_the_kernel) < 20, before_the_kernel


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_dynamo")
@BY_NAME
def test_a_training_step_in_recorded_graphs(op: Op[...], device: torch.device) -> None:
    """torch.compile's mode reduce-overhead records both directions; replays give the bits of the eager step."""
    call = {n: v.detach().to(device).requires_grad_() if is_float(v) else v for n, v in dense(op, 64).items()}
    expected = torch.autograd.grad(loss(op, call), leaves(call))
    compiled = torch.compile(partial(loss, op), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(compiled(call), leaves(call))
        for got, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(got, truth)
    assert counters["inductor"]["cudagraph_skips"] == 0
