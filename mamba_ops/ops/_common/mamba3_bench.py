"""The tensors of a Mamba-3 layer that `mamba-ops bench` times."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import LARGE, SMALL, TINY

MAMBA3 = {LARGE: (64, 64, 128, 1, 32), SMALL: (8, 32, 64, 1, 16), TINY: (4, 16, 16, 2, 4)}
"""Heads, channels of each, size of the state, groups, angles. Large: a layer of width 2048."""


def tensors(
    tokens: int, slots: int, device: torch.device, scale: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Return a call's arguments, its caches, and an output."""
    heads, dim, dstate, groups, angles = MAMBA3[scale or bench.scale_of(device)]
    make = partial(bench.random, device=device)
    arguments = {
        "x": make(tokens, heads, dim),
        "dt": make(tokens, heads).sigmoid(),
        "A": -make(tokens, heads).float().exp(),
        "trap": make(tokens, heads),
        "angles": make(tokens, angles),
        "B": make(tokens, groups, dstate),
        "C": make(tokens, groups, dstate),
        "D": torch.randn(heads, device=device),
        "B_bias": torch.randn(heads, dstate, device=device),
        "C_bias": torch.randn(heads, dstate, device=device),
    }
    caches = {
        "angle_state": 6 * torch.rand(slots, heads, angles, device=device),
        "ssm_state": torch.randn(slots, heads, dim, dstate, device=device),
        "k_state": make(slots, heads, dstate),
        "v_state": make(slots, heads, dim),
    }
    return arguments, caches, make(tokens, heads, dim)
