"""How the kernels that are for Hopper alone are launched, and which calls they take."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._triton.gluon import runs_on_hopper

MODULE = "mamba_ops.ops.mamba_chunk_scan.triton.hopper"
PIECE = 64  # tokens, at most
_WARPS = {"LOAD_REGISTERS": 40, "WALK_REGISTERS": 232, "num_warps": 4, "maxnreg": 168}  # all that there are


def is_hopper_walk(*tensors: Tensor | None, heads: int, groups: int, dim: int, dstate: int, aligned: bool) -> bool:
    """Return whether `_walk` takes x and the other activations: on Hopper, of the only sizes that it is written for."""
    there = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.dtype for tensor in there}
    if not (aligned and len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16}):
        return False
    if (dim, dstate) != (64, 128) or heads // groups % 2 or any(tensor.stride(0) >= 1 << 24 for tensor in there):
        return False
    return runs_on_hopper(there[0].get_device(), MODULE)


def launch_advance(rows: int, tensors: tuple[Any, ...], numbers: tuple[Any, ...], **sizes: Any) -> None:
    """Launch `_advance`."""
    from mamba_ops.ops.mamba_chunk_scan.triton.hopper_states import _advance

    _advance[(rows * sizes["HEADS"] // 2,)](*tensors, *numbers, **sizes, STAGES=5, **_WARPS)


def launch_walk(segments: int, tensors: tuple[Any, ...], numbers: tuple[Any, ...], **sizes: Any) -> None:
    """Launch `_walk`, with as many registers for all as there are: steps and loads get theirs by what they need."""
    from mamba_ops.ops.mamba_chunk_scan.triton.hopper import _walk

    z = tensors[4]  # takes a quarter of what shared memory there is
    stages = 3 if z is None else 2
    _walk[(segments * sizes["HEADS"] // 2,)](*tensors, *numbers, **sizes, STAGES=stages, **_WARPS)
