"""Calls of mamba2_mixing: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.mixing import (
    SAMPLE_SLOTS,
    sample_plans,
)
from mamba_ops.ops.mamba2_mixing.op import mamba2_mixing
from mamba_ops.registry import Sample


@mamba2_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    head_dim: int = 8,
    dstate: int = 16,
    groups: int = 2,
    width: int = 4,
    chunk_size: int = 8,
) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        h, p, s, g = (2 * heads, head_dim // 2, 2 * dstate, 1) if other else (heads, head_dim, dstate, groups)
        weights_dtype = torch.float32 if other else dtype
        dim = h * p + 2 * g * s
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes"):
            options |= {"dt_min": 0.1, "dt_max": 0.7, "out": normal(tokens, h, p, dtype=torch.float32)}
        arguments = (
            normal(tokens, h * p + dim + h),
            normal(SAMPLE_SLOTS, state_len, dim).transpose(1, 2),
            normal(SAMPLE_SLOTS, h, p, s, dtype=state_dtype),
            normal(dim, width - other, dtype=weights_dtype),
            None if other else normal(dim),
            -normal(h, dtype=torch.float32).exp(),
            normal(h, dtype=weights_dtype),
            normal(h, dtype=weights_dtype),
        )
        yield Sample(name, (*arguments, *plan, h, p, s, g, chunk_size // (1 + other)), options)
