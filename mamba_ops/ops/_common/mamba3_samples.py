"""What the samples of Mamba-3's ops are made of."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.samples import SampleTensors

TOKENS = ("x", "dt", "A", "trap", "angles", "B", "C")


def tokens_of(make: SampleTensors, *lead: int, heads: int, dim: int, dstate: int, groups: int, angles: int) -> Any:
    """Return the activations of a call with tokens of shape `lead`, by name."""
    normal = make.normal
    return {
        "x": normal(*lead, heads, dim),
        "dt": normal(*lead, heads, dtype=torch.float32).sigmoid(),
        "A": -normal(*lead, heads, dtype=torch.float32).exp(),
        "trap": normal(*lead, heads),
        "angles": normal(*lead, angles),
        "B": normal(*lead, groups, dstate),
        "C": normal(*lead, groups, dstate),
    }


def caches_of(
    make: SampleTensors, slots: int, *, heads: int, dim: int, dstate: int, angles: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return four caches, by name; states in `dtype`, what is kept of inputs in that of the activations."""
    normal = make.normal
    return {
        "angle_state": normal(slots, heads, angles, dtype=torch.float32).sigmoid() * 6,
        "ssm_state": normal(slots, heads, dim, dstate, dtype=dtype),
        "k_state": normal(slots, heads, dstate),
        "v_state": normal(slots, heads, dim),
    }
