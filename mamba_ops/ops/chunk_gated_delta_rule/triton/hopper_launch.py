"""How the kernels that are for Hopper alone are launched, and which calls they take."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._triton.gluon import multiprocessors, runs_on_hopper

MODULE = "mamba_ops.ops.chunk_gated_delta_rule.triton.hopper"
_SYSTEMS = f"{MODULE}_systems"


def is_hopper_walk(*tensors: Tensor, aligned: bool) -> bool:
    """Return whether `_walk` takes q, k, v and the output: on Hopper, of the only sizes that it is written for."""
    return _is_wide(tensors, aligned) and runs_on_hopper(tensors[0].get_device(), MODULE)


def is_hopper_solve(*tensors: Tensor, aligned: bool) -> bool:
    """Return whether `_invert` takes them, likewise."""
    return _is_wide(tensors, aligned) and runs_on_hopper(tensors[0].get_device(), _SYSTEMS)


def _is_wide(tensors: tuple[Tensor, ...], aligned: bool) -> bool:
    dtypes = {tensor.dtype for tensor in tensors}
    return aligned and all(t.shape[-1] == 128 for t in tensors) and dtypes in ({torch.bfloat16}, {torch.float16})


def launch_invert(
    systems: int, tensors: tuple[Any, ...], numbers: tuple[Any, ...], k_heads: int, v_heads: int, l2norm: bool
) -> None:
    """Launch `_invert` with as many registers as let four programs run side by side."""
    from mamba_ops.ops.chunk_gated_delta_rule.triton.hopper_systems import _invert

    sizes = {"K_HEADS": k_heads, "V_HEADS": v_heads, "L2NORM": l2norm}
    _invert[(systems,)](*tensors, *numbers, **sizes, num_warps=4, maxnreg=128)


def launch_walk(rows: int, tensors: tuple[Any, ...], numbers: tuple[Any, ...], k_heads: int, v_heads: int) -> None:
    """Launch `_walk`, with as many registers for all as there are: steps and loads get theirs by what they need.

    A program is alone on its multiprocessor. Where there are two for each of the states, each gets half of one's rows.
    Else a program has them all, and what it loads is read once.
    """
    from mamba_ops.ops.chunk_gated_delta_rule.triton.hopper import _walk

    states = rows * v_heads
    parts = 2 if 2 * states <= multiprocessors(tensors[0].get_device()) else 1
    _walk[(states * parts,)](
        *tensors,
        *numbers,
        parts,
        K_HEADS=k_heads,
        V_HEADS=v_heads,
        STAGES=3,
        LOAD_REGISTERS=56,
        WALK_REGISTERS=224,
        num_warps=4,
        maxnreg=168,
    )
