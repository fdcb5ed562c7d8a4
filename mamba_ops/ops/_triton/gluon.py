"""Where kernels run that are written in Gluon, Triton's language for what one family of GPUs has.

And how the walk over chunks is launched, which the gated delta rule and KDA share.
"""

import functools
import importlib
from typing import Any

import torch
import triton
from torch import Tensor

from mamba_ops.ops._triton.launch_config import family
from mamba_ops.ops._triton.limits import multiprocessors

KNOWN = ("3.6", "3.7")
"""Versions of Triton by which kernels in Gluon were compiled: its names change from one to the next."""

_WALK = "mamba_ops.ops._triton.hopper_walk"


def runs_on_hopper(device: int, module: str) -> bool:
    """Return whether a device is a Hopper GPU, and this Triton has what a module of kernels for it needs."""
    return family(device) == "cuda-90" and _imports(module)


@functools.cache
def _imports(module: str) -> bool:
    if ".".join(triton.__version__.split(".")[:2]) not in KNOWN:
        return False
    try:
        importlib.import_module(module)
    except (ImportError, AttributeError):  # a build without Gluon, or with an earlier one
        return False
    return True


def is_wide(*tensors: Tensor, aligned: bool) -> bool:
    """Return whether keys and values are of the only sizes and dtypes that kernels for Hopper are written for."""
    dtypes = {tensor.dtype for tensor in tensors}
    return aligned and all(t.shape[-1] == 128 for t in tensors) and dtypes in ({torch.bfloat16}, {torch.float16})


def is_hopper_walk(*tensors: Tensor, aligned: bool) -> bool:
    """Return whether the walk for Hopper takes q, k, v and the output."""
    return is_wide(*tensors, aligned=aligned) and runs_on_hopper(tensors[0].get_device(), _WALK)


def launch_walk(states: int, tensors: tuple[Any, ...], numbers: tuple[Any, ...], **sizes: int) -> None:
    """Launch the walk with as many registers for all as there are: steps and loads get theirs by what they need.

    A program is alone on its multiprocessor. Where there are two for each of the states, each gets half of one's rows.
    Else a program has them all, and what it loads is read once.
    """
    from mamba_ops.ops._triton.hopper_walk import _walk

    parts = 2 if 2 * states <= multiprocessors(tensors[2].get_device()) else 1
    registers = {"LOAD_REGISTERS": 56, "WALK_REGISTERS": 224, "num_warps": 4, "maxnreg": 168}
    _walk[(states * parts,)](*tensors, *numbers, parts, **sizes, **registers)
