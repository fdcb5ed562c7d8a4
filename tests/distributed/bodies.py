"""What the ranks of the distributed tests do; each function here runs on every rank."""

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from mamba_ops import functional, ops
from mamba_ops.distributed import checkpoint_map, fully_shard, tensor_parallel
from mamba_ops.distributed.fsdp import DECAYS
from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2, Mamba3, ShortConv
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.registry import record_selections
from tests.export.programs import bound
from tests.harness import OPS

HIDDEN = 12
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mamba": (Mamba, {"d_inner": 16, "dstate": 4, "dt_rank": 3, "bias": True}),
    "mamba, weighted norms": (Mamba, {"d_inner": 16, "dstate": 4, "dt_rank": 3, "norms": "weighted"}),
    "mamba2": (Mamba2, {"heads": 8, "head_dim": 4, "dstate": 6, "groups": 4, "chunk_size": 4, "bias": True}),
    "mamba2, one group": (Mamba2, {"heads": 4, "head_dim": 4, "dstate": 6, "groups": 1, "chunk_size": 4}),
    "mamba2, two groups": (Mamba2, {"heads": 8, "head_dim": 4, "dstate": 6, "groups": 2, "chunk_size": 4}),
    "gdn": (GatedDeltaNet, {"num_k_heads": 4, "num_v_heads": 8, "head_k_dim": 4, "head_v_dim": 6}),
    "gdn, two heads of k": (GatedDeltaNet, {"num_k_heads": 2, "num_v_heads": 8, "head_k_dim": 4, "head_v_dim": 6}),
    "mamba3": (Mamba3, {"heads": 4, "head_dim": 4, "dstate": 6, "groups": 4, "chunk_size": 4, "out_norm": True}),
    "mamba3, two groups, mimo": (
        Mamba3,
        {"heads": 4, "head_dim": 4, "dstate": 4, "groups": 2, "chunk_size": 4, "is_mimo": True, "mimo_rank": 2},
    ),
    "short conv": (ShortConv, {"bias": True}),
    "gdn, one head of k, four projections": (
        GatedDeltaNet,
        {"num_k_heads": 1, "num_v_heads": 4, "head_k_dim": 4, "head_v_dim": 6, "interleaved": False},
    ),
}


def new_layer(name: str) -> Any:
    kind, sizes = LAYERS[name]
    layer = kind(HIDDEN, **sizes, dtype=torch.float64)
    with torch.no_grad():
        for parameter_name, parameter in layer.named_parameters():
            if parameter_name == "A_log":
                parameter.uniform_(-3, 0)
            elif parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter))
    return layer


def gradients(layer: Any, x: Tensor, call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = (layer if call is None else call)(x)
    y.sin().sum().backward()
    return y.detach(), {"x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}


def layers_are_the_whole(rank: int, names: list[str], compiled: bool) -> None:
    """Outputs and all gradients of split layers, prompts and steps; and checkpoints, both ways."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    for name in names:
        torch.manual_seed(0)
        whole = new_layer(name)
        layer = tensor_parallel(copy.deepcopy(whole), mesh)
        x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        y, expected = gradients(whole, x)
        got_y, got = gradients(layer, x, call)
        torch.testing.assert_close(got_y, y, rtol=0, atol=1e-10)
        for parameter, grad in checkpoint_map(layer, mesh.size()).split(expected, rank).items():
            assert grad.abs().max() > 0, (name, parameter)
            torch.testing.assert_close(got[parameter], grad, rtol=0, atol=1e-10)
        parts = [None] * mesh.size()
        dist.all_gather_object(parts, layer.state_dict())
        merged = layer.checkpoint_map.merge(parts)
        assert merged.keys() == whole.state_dict().keys()
        for parameter, tensor in whole.state_dict().items():
            assert torch.equal(merged[parameter], tensor), (name, parameter)
        other = tensor_parallel(new_layer(name), mesh)
        other.load_state_dict(other.checkpoint_map.split(whole.state_dict(), rank))
        with torch.no_grad():
            caches, own = whole.empty_caches(2), other.empty_caches(2)
            torch.testing.assert_close(other(x, *own), whole(x, *caches), rtol=0, atol=1e-10)
            torch.testing.assert_close(other.step(x[:, 0], *own), whole.step(x[:, 0], *caches), rtol=0, atol=1e-10)


def see(seen: dict[str, Tensor], layer: Any, *_: Any) -> None:
    """Keep the decays that a layer had in a call."""
    seen.update({n: v.detach().clone() for n, v in vars(layer).items() if n in DECAYS})


def decays_stay_in_float32(rank: int, compiled: bool) -> None:
    """FSDP2 with a bfloat16 policy: decays, as the layer sees them, and their gradients, are float32 and right."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    for name in ("mamba", "mamba2", "gdn", "short conv", "mamba3, two groups, mimo"):
        torch.manual_seed(0)
        whole = new_layer(name).float()
        layer = copy.deepcopy(whole)
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        seen: dict[str, Tensor] = {}
        layer.register_forward_hook(partial(see, seen))
        expected_model = copy.deepcopy(whole)
        for parameter_name, parameter in expected_model.named_parameters():
            if parameter_name not in DECAYS:
                parameter.data = parameter.data.bfloat16()
        batches = torch.randn(ranks, 2, 9, HIDDEN)
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        call(batches[rank]).float().square().sum().backward()
        for batch in batches:
            (expected_model(batch.bfloat16()).float().square().sum() / ranks).backward()
        assert seen.keys() == {n for n in DECAYS if n in dict(whole.named_parameters())}, seen.keys()
        grads = {n.removeprefix("decays."): p.grad for n, p in layer.named_parameters()}
        for parameter_name, parameter in expected_model.named_parameters():
            grad = grads[parameter_name].full_tensor()
            if parameter_name in DECAYS:
                assert torch.equal(seen[parameter_name], getattr(whole, parameter_name)), (name, parameter_name)
                assert grad.dtype == torch.float32
                torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-5)
            else:  # torch reduces the rest in bfloat16, once per rank
                torch.testing.assert_close(
                    grad, parameter.grad.float(), rtol=0.05, atol=0.02 * float(parameter.grad.abs().max())
                )
        state = layer.state_dict()
        assert state.keys() == whole.state_dict().keys()
        for parameter_name, tensor in whole.state_dict().items():
            assert torch.equal(state[parameter_name].full_tensor(), tensor), parameter_name
        layer.load_state_dict(state)


def heads_and_shards(rank: int, compiled: bool) -> None:
    """On a mesh of two axes, layers whose heads are split over one and whose parameters are sharded over the other,
    under activation checkpointing: all gradients are those of the whole layer on the whole batch.
    """
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    split, part = mesh["tp"], mesh["dp"].get_local_rank()
    for name in LAYERS:
        torch.manual_seed(0)
        whole = new_layer(name).float()
        layer = fully_shard(tensor_parallel(copy.deepcopy(whole), split), mesh=mesh["dp"])
        batches = torch.randn(2, 2, 9, HIDDEN)
        y, expected = gradients(whole, batches.flatten(0, 1))
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        got_y, got = gradients(layer, batches[part], partial(checkpoint, call, use_reentrant=False))
        torch.testing.assert_close(got_y, y.view(2, 2, 9, HIDDEN)[part], rtol=0, atol=1e-5)
        torch.testing.assert_close(got.pop("x"), expected.pop("x").view(2, 2, 9, HIDDEN)[part], rtol=0, atol=1e-5)
        got = {n.removeprefix("decays."): g.full_tensor() * 2 for n, g in got.items()}  # FSDP2 takes the mean
        found = layer.checkpoint_map.split(expected, split.get_local_rank())
        assert got.keys() == found.keys()
        for parameter, grad in found.items():
            assert grad.abs().max() > 0, (name, parameter)
            torch.testing.assert_close(
                got[parameter],
                grad,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m: f"{name} {parameter}: {m}",  # noqa: B023
            )


def calls() -> dict[str, dict[str, Any]]:
    """A call of every op that records gradients, with all that has gradients; by op, and how its groups are."""
    n, length, heads, dim, dstate = 4, 9, 8, 4, 6

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def scan(groups: int) -> dict[str, Any]:
        tokens = {"x": new(n, length, heads), "dt": new(n, length, heads), "A": -new(heads, dstate).exp()}
        tokens |= {name: new(n, length, groups, dstate) for name in ("B", "C")}
        weights = {"D": new(heads), "z": new(n, length, heads), "dt_bias": new(heads), "dt_softplus": True}
        return tokens | weights | {"initial_states": new(n, heads, dstate)}

    def chunk_scan(groups: int) -> dict[str, Any]:
        tokens = {"x": new(n, length, heads, dim), "dt": new(n, length, heads), "A": -new(heads).exp()}
        tokens |= {name: new(n, length, groups, dstate) for name in ("B", "C")}
        weights = {"D": new(heads), "z": new(n, length, heads, dim), "dt_bias": new(heads), "dt_softplus": True}
        return tokens | weights | {"initial_states": new(n, heads, dim, dstate), "chunk_size": 4}

    def delta_rule(k_heads: int, *channels: int) -> dict[str, Any]:
        keyed = {name: new(n, length, k_heads, dstate) for name in ("q", "k")}
        valued = {
            "v": new(n, length, heads, dim),
            "g": -new(n, length, heads, *channels).exp(),
            "beta": new(n, length, heads).sigmoid(),
        }
        return keyed | valued | {"initial_states": new(n, heads, dim, dstate), "qk_l2norm": True}

    def convolution() -> dict[str, Any]:
        return {"x": new(n, length, 8), "weight": new(8, 4), "bias": new(8), "initial_states": new(n, 8, 3)}

    return {
        "causal_conv1d": convolution(),
        "selective_scan": scan(4),
        "selective_scan, one group": scan(1),
        "mamba_chunk_scan": chunk_scan(4),
        "mamba_chunk_scan, one group": chunk_scan(1),
        "chunk_gated_delta_rule": delta_rule(4),
        "chunk_gated_delta_rule, one head of k": delta_rule(1),
        "chunk_kda": delta_rule(4, dstate),
    }


def ops_are_the_whole(rank: int, compiled: bool, two_axes: bool) -> None:
    """Outputs, states and all gradients of ops on DTensors: split by heads, by rows, or by both on a 2-D mesh."""
    ranks = dist.get_world_size()
    shape = (2, ranks // 2) if two_axes else (ranks,)
    mesh = init_device_mesh("cpu", shape)
    done = 0
    for label, call in calls().items():
        name = label.partition(",")[0]
        op, function = getattr(ops, name), getattr(functional, name)
        tensors = {n: v for n, v in call.items() if isinstance(v, Tensor)}
        rest = {n: v for n, v in call.items() if n not in tensors}
        rule = op.forward_op.facets["sharding"]
        heads, rows = rule(**{p: call.get(p) for p in inspect.signature(rule).parameters})

        def run(tensors: dict[str, Tensor], with_states: bool) -> Any:
            arguments = tensors | rest  # noqa: B023
            if with_states:
                return function(**arguments)  # noqa: B023
            del arguments["initial_states"]
            return (op(**arguments),)  # noqa: B023

        for how in ((rows, heads),) if two_axes else ((heads,), (rows,)):
            for with_states in (True, False):
                leaves = {n: v.clone().requires_grad_() for n, v in tensors.items()}
                expected = run(leaves, with_states)
                sum(t.sin().sum() for t in expected).backward()
                placements = {n: [Shard(h[n]) if n in h else Replicate() for h in how] for n in tensors}
                spread = {n: distribute_tensor(v, mesh, placements[n]).requires_grad_() for n, v in tensors.items()}
                torch._dynamo.reset()
                runner = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
                with record_selections() as runs:
                    got = runner(spread, with_states)
                    sum(t.sin().sum() for t in got).backward()
                assert f"{op.qualname}_backward" in [r.op for r in runs]
                exact = how == (heads,) and "one" not in label
                for what, one, two in (
                    *((f"result {i}", g, e) for i, (g, e) in enumerate(zip(got, expected, strict=True))),
                    *((n, spread[n].grad, leaves[n].grad) for n in tensors if with_states or n != "initial_states"),
                ):
                    whole = one.full_tensor()
                    assert two.abs().max() > 0, (label, what)
                    if exact:
                        assert torch.equal(whole, two), (label, what, (whole - two).abs().max())
                    torch.testing.assert_close(whole, two, rtol=0, atol=1e-10, msg=lambda m: f"{label} {what}: {m}")  # noqa: B023
                assert got[0].placements == tuple(Shard(h["output"]) for h in how), label  # nothing was gathered
                with torch.no_grad():
                    torch.testing.assert_close(
                        run(spread, with_states)[0].full_tensor(), expected[0], rtol=0, atol=1e-10
                    )
                done += 1
    assert done == len(calls()) * (2 if two_axes else 4)


def packed_ops_are_the_whole(rank: int) -> None:
    """Packed sequences, which are split by heads alone: outputs, states and all gradients."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for label, call in calls().items():
        name = label.partition(",")[0]
        call = {
            n: v.flatten(0, 1) if isinstance(v, Tensor) and v.shape[:2] == (4, 9) else v for n, v in call.items()
        } | {"cu_seqlens": torch.tensor([0, 5, 5, 20, 36])}
        rule = getattr(ops, name).forward_op.facets["sharding"]
        [heads] = rule(**{p: call.get(p) for p in inspect.signature(rule).parameters})
        leaves = {
            n: v.clone().requires_grad_()
            for n, v in call.items()
            if isinstance(v, Tensor) and v.dtype.is_floating_point
        }
        spread = {
            n: distribute_tensor(v, mesh, [Shard(heads[n]) if n in heads else Replicate()])
            for n, v in call.items()
            if isinstance(v, Tensor)
        }
        of_leaves = {n: spread[n].requires_grad_() for n in leaves}
        for tensors in (leaves, spread):
            results = getattr(functional, name)(**call | tensors)
            sum(t.sin().sum() for t in results).backward()
            tensors["results"] = results
        expected = [*leaves.pop("results"), *(v.grad for v in leaves.values())]
        got = [*spread.pop("results"), *(v.grad for v in of_leaves.values())]
        for one, two in zip(got, expected, strict=True):
            assert two.abs().max() > 0, label
            if "one" not in label:
                assert torch.equal(one.full_tensor(), two), label
            torch.testing.assert_close(one.full_tensor(), two, rtol=0, atol=1e-10)


def uneven_heads_are_right(rank: int) -> None:
    """Six groups of B and C on four ranks cannot go with their heads: they are gathered, and the result is right."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    call = {"x": torch.randn(2, 5, 12, 4), "dt": torch.rand(2, 5, 12), "A": -torch.rand(12)}
    call |= {name: torch.randn(2, 5, 6, 3) for name in ("B", "C")}
    dims = {"x": 2, "dt": 2, "A": 0, "B": 2, "C": 2}
    spread = {n: distribute_tensor(v, mesh, [Shard(dims[n])]) for n, v in call.items()}
    got = ops.mamba_chunk_scan(**spread, chunk_size=4)
    torch.testing.assert_close(got.full_tensor(), ops.mamba_chunk_scan(**call, chunk_size=4))


def mutating_ops_refuse(rank: int, compiled: bool) -> None:
    """Every op says in a sentence that it takes no DTensor as any of its arguments, and nothing is written.

    An op that records gradients runs on DTensors without a cache; with some, it says which others are none.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sentence = r"got a DTensor( beside ordinary tensors, expected one or the other|, expected an ordinary tensor)"
    for op in OPS:
        for pattern in op.patterns:
            tokens = 3 if op.name.endswith("_update") else 9
            call = bound(op, op.make_call(RandomInputs(torch.device("cpu"), 4, tokens, slots=14), pattern))
            names = [n for n, v in call.items() if isinstance(v, Tensor)]
            runs = op.record is None and op.forward_op is not None and not op.mutates & {*names}
            for spread in (names, *([n] for n in names)):
                given = {
                    n: distribute_tensor(v, mesh, [Replicate()]) if n in spread else copy.deepcopy(v)
                    for n, v in call.items()
                }
                if runs and spread == names:
                    torch.testing.assert_close(op(**given).full_tensor(), op(**call))
                    continue
                what = spread[0] if runs or len(spread) == 1 else r"\w+"
                with pytest.raises(ValueError, match=rf"{op.name}(_forward)?: {what}: {sentence}.*to_local"):
                    op(**given)
                if compiled and pattern == op.patterns[0] and spread == names:
                    torch._dynamo.reset()
                    with pytest.raises(Exception, match=f"{op.name}: .*{sentence}"):
                        torch.compile(op.__call__, fullgraph=True, backend="aot_eager")(**given)
                for n in names:
                    assert torch.equal(given[n].to_local() if n in spread else given[n], call[n]), (op, pattern, n)
    state = distribute_tensor(torch.ones(2, 8, 3), mesh, [Replicate()])
    x, weight = (distribute_tensor(t, mesh, [Replicate()]) for t in (torch.ones(2, 8), torch.ones(8, 4)))
    with pytest.raises(Exception, match=sentence):  # without the front
        ops.causal_conv1d_update.overload(x, state, weight, output=x.clone())
    assert torch.equal(state.to_local(), torch.ones(2, 8, 3))
