"""vLLM's ops by layer name, registered as `mamba_ops_vllm::*`: an engine's graph has a layer's name and no caches.

Layer, caches and plan come from the forward context (`mamba_ops.serving.forward_context`), where the layers are those
of `mamba_ops.layers`. The schemas do not declare that the ops write to the caches, as in vLLM. Without a plan, or for a
layer that is not in the context, outputs are zero. Importing this module marks the ops as splitting ops.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mamba_ops.layers.caches import scale_of
from mamba_ops.ops._common.sequences import HasPlan
from mamba_ops.registry import mark_splitting
from mamba_ops.serving import current_context


def _found(name: str) -> tuple[Any, Sequence[Tensor], HasPlan] | None:
    """Return a layer, its caches and the plan; None without a plan, or if the layer is not in the context."""
    context = current_context()
    if context.plan is None or context.plan.tensors.counts is None or name not in context.layers:
        return None
    return context.layers[name], context.caches[name], context.plan


def _mamba_mixer2(projected_states: Tensor, output: Tensor, layer_name: str) -> None:
    """Mix `projected_states` (tokens, size) of a `layers.Mamba2`; write (tokens, heads * head_dim) to `output`."""
    if (found := _found(layer_name)) is None:
        output.zero_()
        return
    layer, caches, plan = found
    out = output.view(-1, layer.heads, layer.head_dim)
    layer.mix(projected_states, *caches[:2], plan, out=out, **scale_of(caches))


def _mamba_mixer(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    """Run the whole of a `layers.Mamba`, projections included; write (tokens, hidden_size) to `output`."""
    if (found := _found(layer_name)) is None:
        output.zero_()
        return
    layer, caches, plan = found
    output.copy_(layer(hidden_states, *caches, plan=plan))


def _short_conv(hidden_states: Tensor, output: Tensor, layer_name: str) -> None:
    """Run the whole of a `layers.ShortConv`, projections included; write (tokens, hidden_size) to `output`."""
    _mamba_mixer(hidden_states, output, layer_name)


def _gdn_attention_core_xpu(
    core_attn_out: Tensor, z: Tensor, projected_states_qkvz: Tensor, projected_states_ba: Tensor, layer_name: str
) -> None:
    """Mix the projections of a `layers.GatedDeltaNet`; write (tokens, v heads, head_v_dim) to both outputs."""
    if (found := _found(layer_name)) is None:
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
