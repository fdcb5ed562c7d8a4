"""What the samples of Mamba-3's ops are made of."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.samples import SampleTensors

MIMO_ERRORS: tuple[Any, ...] = (
    ("MIMO", "mimo_x", lambda _: None, "mimo_z: got a tensor, expected None without mimo_x"),
    ("MIMO", "mimo_x", lambda x: x[:, 0], r"got shape \(4, 8\), expected \(heads, rank, dim\)"),
    ("MIMO", "mimo_x", lambda x: x[:, :0], "got a rank of 0, expected 1 at least; None is for one input a head"),
    ("MIMO", "mimo_x", lambda x: x[:2], r"got shape \(2, 3, 8\), expected \(4, 3, 8\); heads and dim are those of x"),
    ("MIMO", "mimo_x", lambda x: x.int(), "got int32, expected float16"),
    ("MIMO", "mimo_z", lambda _: None, "got None, expected a tensor, as z is given"),
    ("MIMO", "z", lambda _: None, "mimo_z: got a tensor, expected None without z"),
    ("MIMO", "B_bias", lambda b: b[:, 0], r"got shape \(4, 12\), expected \(4, 3, 12\)"),
)
"""Wrong calls of MIMO, of both ops."""


def tokens_of(
    make: SampleTensors,
    *lead: int,
    heads: int,
    dim: int,
    dstate: int,
    groups: int,
    angles: int,
    rank: tuple[int, ...] = (),
) -> Any:
    """Return the activations of a call with tokens of shape `lead`, by name; of MIMO with a `rank`."""
    normal = make.normal
    return {
        "x": normal(*lead, heads, dim),
        "dt": normal(*lead, heads, dtype=torch.float32).sigmoid(),
        "A": -normal(*lead, heads, dtype=torch.float32).exp(),
        "trap": normal(*lead, heads),
        "angles": normal(*lead, angles),
        "B": normal(*lead, *rank, groups, dstate),
        "C": normal(*lead, *rank, groups, dstate),
    }


def mimo_of(make: SampleTensors, rank: int, *, heads: int, dim: int, dstate: int, gated: bool) -> dict[str, Any]:
    """Return what a call of MIMO has of weights of its own, by name."""
    names = ("mimo_x", "mimo_z", "mimo_o") if gated else ("mimo_x", "mimo_o")
    weights = {name: make.normal(heads, rank, dim, dtype=torch.float32) for name in names}
    return weights | {name: make.normal(heads, rank, dstate, dtype=torch.float32) for name in ("B_bias", "C_bias")}


def caches_of(
    make: SampleTensors,
    slots: int,
    *,
    heads: int,
    dim: int,
    dstate: int,
    angles: int,
    dtype: torch.dtype,
    rank: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Return four caches, by name; states in `dtype`, what is kept of inputs in that of the activations."""
    normal = make.normal
    return {
        "angle_state": normal(slots, heads, angles, dtype=torch.float32).sigmoid() * 6,
        "ssm_state": normal(slots, heads, dim, dstate, dtype=dtype),
        "k_state": normal(slots, *rank, heads, dstate),
        "v_state": normal(slots, heads, dim),
    }
