"""Tensor parallelism: every rank has some heads of a layer, and computes what they add to its output."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mamba_ops.distributed.collectives import Ranks
from mamba_ops.distributed.modules import (
    InputLinear,
    OutputLinear,
    PartOfGroupNorm,
    Shared,
    SharedRMSNorm,
    SharedTaps,
    SharedWeightNorm,
)
from mamba_ops.distributed.parts import Part, part_of
from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2, Mamba3
from mamba_ops.layers.mixer import Mixer

M = TypeVar("M", bound=Mixer[Any])


@dataclass(frozen=True)
class CheckpointMap:
    """Which part of a whole layer's state dict each rank has.

    Attributes:
        parts: of every rank.
    """

    parts: tuple[Part, ...]

    def split(self, whole: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        """Return a rank's state dict, given that of the whole layer; entries that are not split stay as they are."""
        slices = self.parts[rank].slices
        return {
            name: tensor.index_select(slices[name].dim, slices[name].entries.to(tensor.device))
            if name in slices
            else tensor
            for name, tensor in whole.items()
        }

    def merge(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the state dict of the whole layer, given those of all ranks, in their order.

        Raises:
            ValueError: there is another number of them.
        """
        if len(parts) != len(self.parts):
            raise ValueError(f"CheckpointMap.merge: got {len(parts)} state dicts, expected {len(self.parts)}")
        whole = dict(parts[0])
        for name in set(whole) & set(self.parts[0].slices):
            dim = self.parts[0].slices[name].dim
            length = 1 + max(int(part.slices[name].entries.max()) for part in self.parts)
            shape = [*whole[name].shape]
            shape[dim] = length
            whole[name] = whole[name].new_empty(shape)
            for part, tensors in zip(self.parts, parts, strict=True):
                index = part.slices[name].entries.to(whole[name].device)
                whole[name].index_copy_(dim, index, tensors[name].to(whole[name].device))
        return whole


def checkpoint_map(layer: nn.Module, ranks: int) -> CheckpointMap:
    """Return which part of a whole layer's state dict each of `ranks` ranks has.

    It works on state dicts alone, without a process group: for splitting and merging checkpoints in one process.

    Args:
        layer: a whole one of `mamba_ops.layers`, on any device (meta too).
        ranks: how many ranks share it.
    """
    if (made := getattr(layer, "checkpoint_map", None)) is not None:
        return cast(CheckpointMap, made)
    return CheckpointMap(tuple(part_of(layer, rank, ranks) for rank in range(ranks)))


@torch.no_grad()
def tensor_parallel(layer: M, mesh: DeviceMesh) -> M:
    """Split a whole layer over the ranks of a mesh, in place, and return it.

    Every rank calls it with the same layer, and then has its part alone: heads (Mamba, ShortConv: channels) evenly, a
    group of B and C, or a head of q and k, on every rank that has a head of it. Calls stay what they were, with one
    input and output on all ranks; caches have the rank's heads alone. Outputs and gradients are those of the whole
    layer: each parameter's gradient is this rank's part, also of what several ranks hold. Each call sums the output
    once over the ranks, and each backward the gradient of the input; Mamba sums the input of its step sizes, B and C
    too, Mamba2 with fewer groups than ranks the squares of its norm.

    Args:
        layer: one of `mamba_ops.layers`; its parameters are replaced by new ones.
        mesh: one axis; of a mesh with several, `mesh["tp"]`. Any device type and number of ranks.

    Returns:
        The layer, with an attribute `checkpoint_map`.

    Raises:
        TypeError: the layer is none of this package's.
        ValueError: the mesh has several axes, the layer is split already, or its heads cannot be divided evenly.
    """
    if mesh.ndim != 1:
        raise ValueError(f"tensor_parallel: mesh: got {mesh.ndim} axes, expected one; pass mesh['tp'], say")
    if getattr(layer, "checkpoint_map", None) is not None:
        raise ValueError("tensor_parallel: layer: got one that is split already, expected a whole one")
    rank, everyone = mesh.get_local_rank(), Ranks(mesh.get_group())
    checkpoint = checkpoint_map(layer, mesh.size())
    part = checkpoint.parts[rank]
    sharers = Ranks(mesh.get_group(), part.sets, part.mine) if part.sets else None
    for name, tensor in checkpoint.split(dict(layer.named_parameters()), rank).items():
        owner, _, last = name.rpartition(".")
        module, old = layer.get_submodule(owner), layer.get_parameter(name)
        module.register_parameter(last, nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad))
    for name, size in part.sizes.items():
        setattr(layer, name, size)
    shared: dict[str, list[Shared]] = defaultdict(list)
    for ranks, of_module in ((sharers, part.shared), (everyone, part.of_all)):
        for name, rows in (of_module or {}).items():
            shared[name] += [] if ranks is None else [Shared(ranks, rows)]
    for name, module in [*layer.named_children()]:
        if isinstance(module, nn.Linear) and name != "dt_proj":  # its weight alone is used
            kind: Any = OutputLinear if name in ("out_proj", "x_proj") else InputLinear
            setattr(layer, name, _as(module, kind, ranks=everyone, shared=shared[name]))
    _fit_sizes(layer)
    if isinstance(layer, GatedDeltaNet):
        layer.norm = _as(layer.norm, SharedWeightNorm, ranks=everyone)
    elif isinstance(layer, Mamba3):
        for name in ("B_norm", "C_norm"):
            setattr(layer, name, _as(layer.get_submodule(name), SharedRMSNorm, ranks=everyone))
        if layer.out_norm:
            layer.norm.groups = layer.heads
    elif isinstance(layer, Mamba2):
        layer.norm.groups = layer.groups
        if sharers is not None:
            channels = layer.norm.weight.shape[0] * mesh.size() // part.sets
            layer.norm = _as(layer.norm, PartOfGroupNorm, ranks=sharers, channels=channels)
    if isinstance(layer, Mamba):
        layer.share = everyone.use
    elif shared["conv1d"]:
        layer.conv1d = _as(layer.get_submodule("conv1d"), SharedTaps, shared=shared["conv1d"])
    layer.checkpoint_map = checkpoint
    return layer


def _as(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> Any:
    """Return a module of a subclass with the same parameters."""
    new = kind.__new__(kind)
    vars(new).update(vars(module) | attributes)
    return new


def _fit_sizes(layer: Mixer[Any]) -> None:
    """Let what modules show of their sizes be what they have."""
    for module in layer.children():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.Conv1d):
            module.in_channels = module.out_channels = module.groups = module.weight.shape[0]
