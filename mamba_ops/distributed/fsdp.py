"""FSDP2 with decays in float32: what is lost of a decay in bfloat16 is lost again at every token."""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as shard

from mamba_ops.layers.mixer import Mixer

M = TypeVar("M", bound=Mixer[Any])
DECAYS = ("A_log", "D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o")
"""What stays in float32: decays, and what Mamba-3 has in float32 beside them."""


class Decays(nn.Module):
    """The decay parameters of a layer, a module of their own, as FSDP2's policies are of modules."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter.detach().float(), parameter.requires_grad))

    def forward(self) -> dict[str, Tensor]:
        """Return them by name; copies, because FSDP2 frees what it has gathered."""
        return {name: parameter.clone() for name, parameter in self.named_parameters()}


def fully_shard(layer: M, **options: Any) -> M:
    """Apply `torch.distributed.fsdp.fully_shard` to a layer, with `DECAYS` in float32, and return it.

    They become a submodule with a policy of its own, `layer.decays` (`layer.forget_gate.decays`, where they are the
    gate's), which is gathered and reduced in float32 whatever `mp_policy` says of the rest; they are float32 also where
    the layer is not. State dicts have them under the layer's
    own names, both ways. The optimizer is made after this call, as always with FSDP2. Calls of the layer gather them;
    `step` does not, as with any method but forward.

    Args:
        layer: any of `mamba_ops.layers`; one without such parameters is sharded as it is.
        options: of `fully_shard`: mesh, mp_policy, reshard_after_forward, offload_policy.

    Raises:
        TypeError: the layer is none of this package's.
    """
    if not isinstance(layer, Mixer):
        expected = "a mamba_ops.layers mixer"
        raise TypeError(f"fully_shard: layer: got a {type(layer).__name__}, expected {expected}; shard each by itself")
    parts: list[nn.Module] = [layer, *layer.children()]
    for module in parts:
        if names := [name for name in DECAYS if name in dict(module.named_parameters(recurse=False))]:
            _set_apart(layer, module, names, options)
    shard(layer, **options)
    return layer


def _set_apart(layer: nn.Module, module: Any, names: list[str], options: dict[str, Any]) -> None:
    """Give the decays of a module, the layer or a part of it, a module and a policy of their own."""
    module.decays = Decays({name: module.get_parameter(name) for name in names})
    for name in names:
        delattr(module, name)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard(cast(nn.Module, module.decays), **options | {"mp_policy": policy})

    def fetch(layer: Any, args: Any) -> None:
        """Let the module find its decays under their names."""
        vars(module).update(module.decays())

    # As FSDP2's own hooks, it runs before what is compiled: a layer compiled by itself stays one graph.
    layer.register_forward_pre_hook(torch.compiler.disable(fetch))
    module.register_state_dict_post_hook(_rename)
    module.register_load_state_dict_pre_hook(_rename_back)


def _rename(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in dict(layer.decays.named_parameters()):
        state_dict[prefix + name] = state_dict.pop(f"{prefix}decays.{name}")


def _rename_back(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in dict(layer.decays.named_parameters()):
        if prefix + name in state_dict:
            state_dict[f"{prefix}decays.{name}"] = state_dict.pop(prefix + name)
