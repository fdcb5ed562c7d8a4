"""Training through the ops as users do: compiled, swapped, checkpointed, under torch.func, with layers."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mamba_ops import functional
from mamba_ops.layers import Mamba2
from mamba_ops.ops._common import chunk_layout
from mamba_ops.registry import Backend, Op, flop_formulas, record_selections, use_backend
from tests.test_numerics import _HostReads
from tests.training.gradients import TRAINED, activation, is_float, named

BY_NAME = pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)


def dense(op: Op[...], length: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A call of an op's forward with every input but initial states, of two rows of a length."""
    generator = torch.Generator().manual_seed(length)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    if op.name == "causal_conv1d":
        return {"x": tensor(2, length, 8), "weight": tensor(8, 4), "bias": tensor(8)}
    if op.name == "selective_scan":
        call = {name: tensor(2, length, 8) for name in ("x", "dt", "z")} | {"dt_bias": tensor(8), "dt_softplus": True}
        call |= {"A": (-tensor(8, 4).detach().exp()).requires_grad_(), "D": tensor(8)}
        return {**call, "B": tensor(2, length, 4), "C": tensor(2, length, 4)}
    if op.name in ("chunk_gated_delta_rule", "chunk_kda"):
        call = {"q": tensor(2, length, 2, 8), "k": tensor(2, length, 2, 8), "v": tensor(2, length, 4, 8)}
        channels = (8,) if op.name == "chunk_kda" else ()
        call["g"] = (-tensor(2, length, 4, *channels).detach().abs()).requires_grad_()
        return {**call, "beta": tensor(2, length, 4).detach().sigmoid().requires_grad_(), "qk_l2norm": True}
    assert op.name == "mamba_chunk_scan", f"say here how {op.name} is called"
    call = {"x": tensor(2, length, 4, 8), "dt": tensor(2, length, 4), "A": (-tensor(4).detach().exp()).requires_grad_()}
    call |= {"B": tensor(2, length, 2, 16), "C": tensor(2, length, 2, 16), "chunk_size": 8}
    return {**call, "D": tensor(4), "z": tensor(2, length, 4, 8), "dt_bias": tensor(4), "dt_softplus": True}


def leaves(call: dict[str, Any]) -> list[Tensor]:
    return [value for value in call.values() if is_float(value)]


def loss(op: Any, call: dict[str, Any]) -> Tensor:
    return op(**call).sin().sum()


@pytest.mark.parametrize("sample_name", ["base", "everything"])
@pytest.mark.parametrize("companion", ["forward_op", "forward_states_op", "backward_op"])
@BY_NAME
def test_opcheck(op: Op[...], companion: str, sample_name: str) -> None:
    """Of the raw ops, the forward with inputs that require grad."""
    checked = getattr(op, companion)
    sample = next(s for s in checked.make_samples("cpu", dtype=torch.float32) if s.name == sample_name)
    args = [a.detach().requires_grad_(companion != "backward_op") if is_float(a) else a for a in sample.args]
    torch.library.opcheck(checked.overload, tuple(args))


@pytest.mark.usefixtures("fresh_dynamo")
@BY_NAME
def test_one_graph_each_way(op: Op[...]) -> None:
    """For four lengths, and the bits of the eager call."""
    compiled = torch.compile(partial(loss, op), fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (12, 17, 23, 31):
        call = dense(op, length)
        for got, expected in zip(
            *(torch.autograd.grad(f(call), leaves(call)) for f in (compiled, partial(loss, op))), strict=True
        ):
            assert torch.equal(got, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


@pytest.mark.usefixtures("fresh_dynamo")
@BY_NAME
def test_a_swap_between_forward_and_backward(op: Op[...]) -> None:
    """No graph more: the backward runs as the forward did, or as `use_backend` around it says."""
    marker = Backend("marker", devices=None, priority=-1)
    marker.implements(op.backward_op)(lambda call: [getattr(call, n).fill_(7.0) for n in op.backward_op.returns])
    try:
        for run in (partial(loss, op), torch.compile(partial(loss, op), fullgraph=True, backend="aot_eager")):
            call = dense(op)
            with use_backend("torch"):
                value, other = run(call), run(call)
            assert float(torch.autograd.grad(value, activation(call))[0].flatten()[0]) != 7.0
            with use_backend("marker"):
                assert float(torch.autograd.grad(other, activation(call))[0].flatten()[0]) == 7.0
                value = run(call)
            assert float(torch.autograd.grad(value, activation(call))[0].flatten()[0]) == 7.0
    finally:
        marker.remove()
    assert counters["stats"]["unique_graphs"] == 1


POLICIES = {"save": CheckpointPolicy.MUST_SAVE, "recompute": CheckpointPolicy.PREFER_RECOMPUTE}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("policy", [*POLICIES, "none"])
@BY_NAME
def test_selective_checkpointing(op: Op[...], policy: str, compiled: bool, fresh_dynamo: None) -> None:
    """Equal gradients; the forward runs once where its result is saved, and twice where it is not."""
    packet = op.forward_op.overload

    def decide(ctx: Any, function: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return POLICIES[policy] if function is packet else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*values: Tensor) -> Tensor:
        return op(**{**call, **dict(zip(names, values, strict=True))}).sin()

    def run(*values: Tensor) -> Tensor:
        if policy == "none":
            return block(*values).sum()
        contexts = partial(create_selective_checkpoint_contexts, decide)
        return checkpoint(block, *values, use_reentrant=False, context_fn=contexts).sum()

    call = dense(op)
    names = [n for n, v in call.items() if is_float(v)]
    values = leaves(call)
    expected = torch.autograd.grad(loss(op, call), values)
    runner = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with record_selections() as runs:
        found = torch.autograd.grad(runner(*values), values)
    for got, truth in zip(found, expected, strict=True):
        assert torch.equal(got, truth)
    forwards = sum(r.op == f"mamba_ops::{op.name}_forward" for r in runs)
    assert forwards == (2 if policy == "recompute" else 1)


@BY_NAME
def test_inputs_are_all_that_is_kept(op: Op[...]) -> None:
    call = dense(op)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op(**call)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in leaves(call)}


@pytest.mark.usefixtures("fresh_dynamo")
@BY_NAME
def test_the_partitioner_keeps_inputs(op: Op[...]) -> None:
    """A compiled forward returns its output, and keeps nothing that is as large and no input."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    call = dense(op)
    torch.compile(lambda: op(**call), fullgraph=True, backend=backend)().sum().backward()
    (outputs,) = (node.args[0] for node in graphs[0].graph.nodes if node.op == "output")
    computed = [n for n in outputs if n is not None and n.op != "placeholder"]
    large = [n for n in computed if n.meta["val"].numel() >= activation(call).numel()]
    assert len(large) == 1, graphs[0].graph


@BY_NAME
def test_torch_func(op: Op[...]) -> None:
    call = {n: v.detach().double() if is_float(v) else v for n, v in dense(op).items()}
    main = next(n for n, v in call.items() if v is activation(call))
    rest = {n: v for n, v in call.items() if n != main}
    gradient = torch.func.grad(lambda x: loss(op, {**rest, main: x}))(activation(call))
    x = activation(call).clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(loss(op, {**rest, main: x}), x)[0])
    of_rows = [n for n, v in call.items() if is_float(v) and v.shape[:2] == x.shape[:2]]
    stacked = {n: torch.stack((call[n], call[n].flip(0))) for n in of_rows}
    mapped = torch.func.vmap(lambda rows: op(**{**call, **rows}))(stacked)
    assert torch.equal(mapped[1], op(**{**call, **{n: call[n].flip(0) for n in of_rows}}))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: op(**{**rest, main: x}), (activation(call),), (activation(call),))
    (gradient,) = torch.autograd.grad(loss(op, {**rest, main: x}), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        gradient.sum().backward()


@BY_NAME
def test_no_grad_runs_the_op_alone(op: Op[...]) -> None:
    call = dense(op)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, record_selections() as runs:
            op(**call)
        assert [run.op for run in runs] == [op.qualname]


@BY_NAME
def test_it_never_reads_the_host(op: Op[...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_layout, "are_here", lambda lengths: False)  # as on a device
    samples = op.backward_op.make_samples("cpu")
    assert samples
    for sample in samples:
        with torch.no_grad(), use_backend("torch"), _HostReads() as reads:
            bound = op.backward_op.bind(sample.args, {})
            op.backward_op.kernels["torch"].function(
                *(bound[p.name] for p in op.backward_op._called),
                **{name: bound[name] for name in op.backward_op.returns},
            )
        assert reads.count == 0, sample


@BY_NAME
def test_flops(op: Op[...]) -> None:
    call = dense(op)
    totals = []
    for function in (lambda: op(**call), lambda: loss(op, call).backward()):
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            function()
        totals.append(counter.get_total_flops())
    assert 2 * totals[0] < totals[1] < 5 * totals[0]


@BY_NAME
def test_functional(op: Op[...]) -> None:
    """The same as the forward op, with states; and without gradients where none are asked for."""
    states = op.forward_states_op
    sample = next(s for s in states.make_samples("cpu") if s.name == "everything")
    call = named(states, sample)
    function = getattr(functional, op.name)
    with torch.no_grad():
        output, final = function(**call)
        assert torch.equal(output, states(**call)[0])
        assert torch.equal(final, states(**call)[1])
    call["initial_states"] = call["initial_states"].detach().requires_grad_()
    function(**call)[1].float().sum().backward()
    assert call["initial_states"].grad is not None
    with pytest.raises(ValueError, match=r"initial_states: got shape .* expected"):
        function(**{**call, "initial_states": call["initial_states"][:1]})


def mamba2(**options: Any) -> Mamba2:
    return Mamba2(32, heads=4, head_dim=8, dstate=16, groups=2, chunk_size=8, **options)


@pytest.mark.usefixtures("fresh_dynamo")
def test_mamba2_trains_in_one_graph() -> None:
    layer = mamba2()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    names = [name for name, _ in layer.named_parameters()]
    for length in (20, 21, 33, 47):
        x = torch.randn(2, length, 32, requires_grad=True)
        inputs = [x, *layer.parameters()]
        grads = [torch.autograd.grad(f(x).square().mean(), inputs) for f in (layer, compiled)]
        for name, expected, got in zip(["x", *names], *grads, strict=True):
            assert torch.equal(expected, got), name
            assert expected.abs().max() > 0, name
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


def test_mamba2_trains_packed_rows_as_alone() -> None:
    layer = mamba2().double()
    x = torch.randn(17, 32, dtype=torch.double, requires_grad=True)
    packed = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 17]))
    alone = torch.cat([layer(x[None, :5])[0], layer(x[None, 5:])[0]])
    torch.testing.assert_close(packed, alone)
    inputs = [x, *layer.parameters()]
    grads = (torch.autograd.grad(y.sin().sum(), inputs) for y in (packed, alone))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_mamba2_learns() -> None:
    torch.manual_seed(0)
    layer = mamba2()
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x = torch.randn(4, 24, 32)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        value = (layer(x) - x.cumsum(1) / 10).square().mean()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_mamba2_with_caches_says_what_to_do() -> None:
    layer = mamba2()
    conv_state, ssm_state = layer.empty_caches(2)
    with pytest.raises(ValueError, match=r"causal_conv1d: .* mamba_ops.functional.causal_conv1d; else call it under"):
        layer(torch.randn(2, 5, 32), conv_state, ssm_state)


AOT_CACHE = """
import torch, torch._inductor.config
from torch._dynamo.utils import counters
from mamba_ops.layers import Mamba2
torch.manual_seed(0)
layer = Mamba2(32, heads=4, head_dim=8, dstate=16, groups=2, chunk_size=8)
torch.compile(layer, fullgraph=True)(torch.randn(2, 20, 32)).sum().backward()
found = counters["aot_autograd"]
print(found["autograd_cache_hit"], found["autograd_cache_miss"], found["autograd_cache_bypass"])
"""


@pytest.mark.slow
def test_a_second_process_finds_the_graphs(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", AOT_CACHE], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        runs.append(done.stdout.split())
    assert runs == [["0", "1", "0"], ["1", "0", "0"]]


def test_decay_parameters_stay_in_float32() -> None:
    layer = mamba2(dtype=torch.bfloat16, decay_dtype=torch.float32)
    layer(torch.randn(2, 9, 32, dtype=torch.bfloat16)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == (torch.float32 if name in ("A_log", "D", "dt_bias") else torch.bfloat16), name
