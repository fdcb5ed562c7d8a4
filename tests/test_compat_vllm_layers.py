"""vLLM's ops by layer name, over a forward context."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba_ops import registry
from mamba_ops.compat import vllm
from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2, ShortConv
from mamba_ops.ops._common.sequences import NO_PLAN
from mamba_ops.registry import splitting_ops, use_backend
from mamba_ops.serving import ForwardContext, PiecewiseRunner, Plan, StatePool, forward_context
from tests.vllm_inputs import DEVICE, close, normal


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # which alone takes float64
        yield


class ByName(nn.Module):
    """An engine's model: its graph knows layers by their names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {
                "mamba2": Mamba2(16, heads=4, head_dim=8, dstate=8, chunk_size=8),
                "mamba": Mamba(16, d_inner=24, dstate=8, dt_rank=3),
                "gdn": GatedDeltaNet(16, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
                "short_conv": ShortConv(16),
            }
        )
        self.double().to(DEVICE)
        self.pool = StatePool.of(dict(self.layers.items()), 6, null_slot=0, state_dtype=torch.float64)
        self.context = ForwardContext(dict(self.layers.items()), self.pool.caches)

    def forward(self, hidden: Tensor) -> Tensor:
        mamba2: Any = self.layers["mamba2"]
        projected = mamba2.in_proj(hidden)
        out = projected.new_empty(hidden.shape[0], 32)
        torch.ops.mamba_ops_vllm.mamba_mixer2(projected, out, "mamba2")
        hidden = hidden + mamba2.out_proj(mamba2.norm(out, projected[:, :32]))
        out = torch.empty_like(hidden)
        torch.ops.mamba_ops_vllm.mamba_mixer(hidden, out, "mamba")
        hidden = hidden + out
        gdn: Any = self.layers["gdn"]
        core = hidden.new_empty(hidden.shape[0], 4, 4)
        z = torch.empty_like(core)
        qkvz, ba = gdn.in_proj_qkvz(hidden), gdn.in_proj_ba(hidden)
        torch.ops.mamba_ops_vllm.gdn_attention_core_xpu(core, z, qkvz, ba, "gdn")
        hidden = hidden + gdn.out_proj(gdn.norm(core, z).flatten(1))
        out = torch.empty_like(hidden)
        torch.ops.mamba_ops_vllm.short_conv(hidden, out, "short_conv")
        return hidden + out

    def directly(self, hidden: Tensor, plan: Plan) -> Tensor:
        for name, layer in self.layers.items():
            hidden = hidden + layer(hidden, *self.pool.caches[name], plan=plan)
        return hidden


def test_a_model_by_layer_names_in_the_runner() -> None:
    """The runner gives its context each step's plan; the graph is cut at vLLM's ops, and holds no cache."""
    torch._dynamo.reset()
    model = ByName()
    sizes = {"max_tokens": 16, "max_requests": 6, "capture_sizes": (2, 4, 8, 16), "null_slot": 0}
    runner = PiecewiseRunner(model, **sizes, device=DEVICE, context=model.context, compile_piece="eager")
    states = [cache for caches in model.pool.caches.values() for cache in caches]
    for computed, new in [([0, 0], [5, 3]), ([5, 3], [1, 1]), ([6, 4, 0], [1, 2, 4])] * 2:
        plan = Plan.of(computed, new, [4, 2, 1][: len(new)], max_requests=6, null_slot=0, device=DEVICE)
        hidden, before = normal(plan.tokens, 16), [state.clone() for state in states]
        got = runner(plan, hidden).clone()
        after = [state.clone() for state in states]
        for state, old in zip(states, before, strict=True):
            state.copy_(old)
        close(got, model.directly(hidden, plan))
        close(after, states)
    [pieces] = runner.backend.graphs
    names = ["mamba_mixer2", "mamba_mixer", "gdn_attention_core_xpu", "short_conv"]
    assert [piece.ops for piece in pieces] == [
        *(ops for name in names for ops in ((), (f"mamba_ops_vllm::{name}",))),
        (),
    ]


@pytest.mark.parametrize("why", ["no plan", "an empty plan", "another layer"])
def test_without_a_plan_outputs_are_zero(why: str) -> None:
    model = ByName()
    plan = Plan.of([0], [3], [2], max_requests=6, null_slot=0, device=DEVICE)
    context = {
        "no plan": model.context,
        "an empty plan": ForwardContext(model.layers, model.pool.caches, Plan(NO_PLAN, 3)),
        "another layer": ForwardContext({}, {}, plan),
    }[why]
    out, hidden_out, core, z = normal(3, 32), normal(3, 16), normal(3, 4, 4), normal(3, 4, 4)
    convolved = normal(3, 16)
    with forward_context(context):
        vllm.mamba_mixer2(normal(3, 84), out, "mamba2")
        vllm.mamba_mixer(normal(3, 16), hidden_out, "mamba")
        vllm.gdn_attention_core_xpu(core, z, normal(3, 64), normal(3, 8), "gdn")
        vllm.short_conv(normal(3, 16), convolved, "short_conv")
    assert not any(t.any() for t in (out, hidden_out, core, z, convolved))
    assert not any(cache.any() for caches in model.pool.caches.values() for cache in caches)


def test_a_layer_of_another_kind_and_caches_that_are_not_there_are_named() -> None:
    model, plan = ByName(), Plan.of([0], [3], [2], max_requests=6, null_slot=0, device=DEVICE)
    calls: dict[str, Callable[[str], None]] = {
        "mamba_mixer2": lambda name: vllm.mamba_mixer2(normal(3, 84), normal(3, 32), name),
        "mamba_mixer": lambda name: vllm.mamba_mixer(normal(3, 16), normal(3, 16), name),
        "gdn_attention_core_xpu": lambda name: vllm.gdn_attention_core_xpu(
            normal(3, 4, 4), normal(3, 4, 4), normal(3, 64), normal(3, 8), name
        ),
        "short_conv": lambda name: vllm.short_conv(normal(3, 16), normal(3, 16), name),
    }
    own = dict(zip(calls, ("mamba2", "mamba", "gdn", "short_conv"), strict=True))
    for op, call in calls.items():
        other = "mamba" if op != "mamba_mixer" else "gdn"
        said = f"^mamba_ops_vllm::{op}: layer_name: got '{other}', a {type(model.layers[other]).__name__}, expected the"
        with (
            forward_context(ForwardContext(model.layers, model.pool.caches, plan)),
            pytest.raises(ValueError, match=said),
        ):
            call(other)
        for caches in ({}, {own[op]: model.pool.caches[own[op]][:0]}):
            said = f"^mamba_ops_vllm::{op}: layer_name: got '{own[op]}', whose caches in the forward context are 0, exp"
            with forward_context(ForwardContext(model.layers, caches, plan)), pytest.raises(ValueError, match=said):
                call(own[op])
    assert not any(cache.any() for caches in model.pool.caches.values() for cache in caches)
    with pytest.raises(
        ValueError, match=r"^ForwardContext: plan: got a int, expected a mamba_ops.serving.Plan, or None"
    ):
        ForwardContext(model.layers, model.pool.caches, 3)


def test_ops_by_name_are_splitting_ops_and_none_of_the_registry() -> None:
    names = {"mamba_mixer2", "mamba_mixer", "gdn_attention_core_xpu", "short_conv"}
    assert {f"mamba_ops_vllm::{name}" for name in names} <= set(splitting_ops())
    assert not names & registry.ops().keys()
    with pytest.raises(RuntimeError, match="no forward context"):
        vllm.mamba_mixer2(normal(3, 84), normal(3, 32), "mamba2")


@pytest.mark.parametrize("name", ["mamba_mixer2", "mamba_mixer", "gdn_attention_core_xpu", "short_conv"])
def test_their_schemas_are_vllms(name: str) -> None:
    mixer = "Tensor(a!) output, str layer_name"
    core = "Tensor(a!) core_attn_out, Tensor(b!) z, Tensor projected_states_qkvz, Tensor projected_states_ba"
    expected = {
        "mamba_mixer2": f"Tensor projected_states, {mixer}",
        "mamba_mixer": f"Tensor hidden_states, {mixer}",
        "short_conv": f"Tensor hidden_states, {mixer}",
        "gdn_attention_core_xpu": f"{core}, str layer_name",
    }
    assert str(getattr(vllm, name)._schema) == f"mamba_ops_vllm::{name}({expected[name]}) -> ()"


def test_their_fakes_and_schemas_are_right() -> None:
    """As far as a schema says it: what an op writes to the caches does not stand there."""
    model = ByName()
    with forward_context(model.context):
        for op, shapes in {
            vllm.mamba_mixer2: [(3, 84), (3, 32)],
            vllm.mamba_mixer: [(3, 16), (3, 16)],
            vllm.gdn_attention_core_xpu: [(3, 4, 4), (3, 4, 4), (3, 64), (3, 8)],
        }.items():
            tensors = tuple(normal(*shape) for shape in shapes)
            torch.library.opcheck(op, (*tensors, "mamba2"), test_utils=("test_schema", "test_faketensor"))
