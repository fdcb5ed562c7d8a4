"""vLLM's ops by layer name, registered as `mamba_ops_vllm::*`: an engine's graph has a layer's name and no caches.

Layer, caches and plan come from the forward context (`mamba_ops.serving.forward_context`), where the layers are those
of `mamba_ops.layers`. The schemas do not declare that the ops write to the caches, as in vLLM. Without a plan, or for a
layer that is not in the context, outputs are zero. Importing this module marks the ops as splitting ops.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2, ShortConv
from mamba_ops.layers.caches import scale_of
from mamba_ops.layers.mixer import Mixer
from mamba_ops.ops._common.sequences import HasPlan
from mamba_ops.registry import mark_splitting
from mamba_ops.serving import current_context


def _found(op: str, name: str, kind: type[Mixer[Any]]) -> tuple[Any, Sequence[Tensor], HasPlan] | None:
    """Return a layer, its caches and the plan; None without a plan, or if the layer is not in the context.

    Raises:
        ValueError: in a call of `op`, the layer is of another kind, or its caches are not there.
    """
    context = current_context()
    if context.plan is None or context.plan.tensors.counts is None or name not in context.layers:
        return None
    layer, caches = context.layers[name], context.caches.get(name, ())
    if not isinstance(layer, kind):
        got, expected = f"{name!r}, a {type(layer).__name__}", f"the name of a {kind.__name__}"
        raise ValueError(f"mamba_ops_vllm::{op}: layer_name: got {got}, expected {expected}")
    sizes = [len(each._fields) for each in (layer.Caches, layer.NarrowCaches) if each is not None]
    if len(caches) not in sizes:
        expected = f"{' or '.join(map(str, sizes))}, as layer.empty_caches() makes them"
        got = f"{name!r}, whose caches in the forward context are {len(caches)}"
        raise ValueError(f"mamba_ops_vllm::{op}: layer_name: got {got}, expected {expected}")
    return layer, caches, context.plan


def _mamba_mixer2(projected_states: Tensor, output: Tensor, layer_name: str) -> None:
    """Mix `projected_states` (tokens, size) of a `layers.Mamba2`; write (tokens, heads * head_dim) to `output`."""
    if (found := _found("mamba_mixer2", layer_name, Mamba2)) is None:
        output.zero_()
        return
    layer, caches, plan = found
    out = output.view(-1, layer.heads, layer.head_dim)
    layer.mix(projected_states, *caches[:2], plan, out=out, **scale_of(caches))


def _mamba_mixer(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    """Run the whole of a `layers.Mamba`, projections included; write (tokens, hidden_size) to `output`."""
    _whole("mamba_mixer", Mamba, hidden_states, output, layer_name)


def _short_conv(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    """Run the whole of a `layers.ShortConv`, projections included; write (tokens, hidden_size) to `output`."""
    _whole("short_conv", ShortConv, hidden_states, output, layer_name)


def _whole(op: str, kind: type[Mixer[Any]], hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    if (found := _found(op, layer_name, kind)) is None:
        output.zero_()
        return
    layer, caches, plan = found
    output.copy_(layer(hidden_states, *caches, plan=plan))


def _gdn_attention_core_xpu(
    core_attn_out: Tensor, z: Tensor, projected_states_qkvz: Tensor, projected_states_ba: Tensor, layer_name: str
) -> None:
    """Mix the projections of a `layers.GatedDeltaNet`; write (tokens, v heads, head_v_dim) to both outputs."""
    if (found := _found("gdn_attention_core_xpu", layer_name, GatedDeltaNet)) is None:
        core_attn_out.zero_()
        z.zero_()
        return
    layer, caches, plan = found
    layer.mix(projected_states_qkvz, projected_states_ba, *caches[:2], plan, z=z, out=core_attn_out, **scale_of(caches))


_library = torch.library.Library("mamba_ops_vllm", "FRAGMENT")
for _body, _schema in {
    _mamba_mixer2: "mamba_mixer2(Tensor projected_states, Tensor(a!) output, str layer_name) -> ()",
    _mamba_mixer: "mamba_mixer(Tensor hidden_states, Tensor(a!) output, str layer_name) -> ()",
    _short_conv: "short_conv(Tensor hidden_states, Tensor(a!) output, str layer_name) -> ()",
    _gdn_attention_core_xpu: "gdn_attention_core_xpu(Tensor(a!) core_attn_out, Tensor(b!) z, "
    "Tensor projected_states_qkvz, Tensor projected_states_ba, str layer_name) -> ()",
}.items():
    _name = _schema.partition("(")[0]
    _library.define(
        _schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    )  # they read a plan's counts
    _library.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mamba_ops_vllm::{_name}", lambda *args: None, lib=_library)
    mark_splitting(f"mamba_ops_vllm::{_name}")

mamba_mixer2 = torch.ops.mamba_ops_vllm.mamba_mixer2.default
mamba_mixer = torch.ops.mamba_ops_vllm.mamba_mixer.default
short_conv = torch.ops.mamba_ops_vllm.short_conv.default
gdn_attention_core_xpu = torch.ops.mamba_ops_vllm.gdn_attention_core_xpu.default
