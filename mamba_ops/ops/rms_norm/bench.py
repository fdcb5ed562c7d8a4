"""What `mamba-ops bench` times of rms_norm, and the peers of it."""

from functools import partial
from typing import Any

import torch

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import LARGE, MAMBA2, Case
from mamba_ops.ops.rms_norm.op import rms_norm

rms_norm.bench_host("one token", 4, 1, dim=256)

MODEL = {LARGE: 4096, bench.SMALL: 256, bench.TINY: 32}
"""Channels between the layers of the same model; as many heads of 128 channels has a delta rule of that size."""


def gated(tokens: int, device: torch.device, *, scale: str | None = None) -> Case:
    """The norm of a Mamba-2 layer: the gate comes first, and is a slice of the projection."""
    heads, head_dim, dstate, groups, _ = MAMBA2[scale or bench.scale_of(device)]
    dim, make = heads * head_dim, partial(bench.random, device=device)
    projected = make(tokens, 2 * dim + 2 * groups * dstate + heads)
    x = make(tokens, dim)
    arguments = {"x": x, "weight": make(dim), "gate": projected[:, :dim], "groups": groups}
    return Case(rms_norm, f"{bench.of_rows(tokens)}, gate first", arguments, {}, torch.empty_like(x))


def heads(tokens: int, device: torch.device, *, scale: str | None = None) -> Case:
    """The norm of a gated delta rule's heads: the gate comes after it."""
    size = MODEL[scale or bench.scale_of(device)]
    head_dim = min(size, 128)
    x, gate = (bench.random(tokens, size // head_dim, head_dim, device=device) for _ in range(2))
    arguments = {"x": x, "weight": bench.random(head_dim, device=device), "gate": gate, "norm_before_gate": True}
    return Case(rms_norm, f"{bench.of_rows(tokens)}, heads", arguments, {}, torch.empty_like(x))


def between(tokens: int, device: torch.device, *, scale: str | None = None) -> Case:
    """The norm before a layer, which adds what the last one gave to a float32 residual."""
    size = MODEL[scale or bench.scale_of(device)]
    x = bench.random(tokens, size, device=device)
    residual = torch.randn(tokens, size, device=device)
    arguments: dict[str, Any] = {"x": x, "weight": bench.random(size, device=device), "residual": residual}
    name = f"{bench.of_rows(tokens)}, residual"
    caches = {"total": torch.empty_like(residual)}
    return Case(rms_norm, name, arguments, caches, torch.empty_like(x), reads_caches=False)


@rms_norm.bench_cases
def _cases(scale: str) -> list[bench.Build]:
    tokens = (1, 4096) if scale == LARGE else (1, 64)
    return [partial(build, count, scale=scale) for build in (gated, heads, between) for count in tokens]
