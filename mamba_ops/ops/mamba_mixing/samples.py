"""Calls of mamba_mixing: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.mixing import (
    SAMPLE_SLOTS,
    sample_plans,
)
from mamba_ops.ops.mamba_mixing.op import mamba_mixing
from mamba_ops.registry import Sample


@mamba_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    inner: int = 24,
    dstate: int = 8,
    dt_rank: int = 5,
    width: int = 4,
) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        d, s, r = (inner // 2, 2 * dstate, dt_rank + 2) if other else (inner, dstate, dt_rank)
        weights_dtype = torch.float32 if other else dtype
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes"):
            options |= {"norm_eps": 0.1, "out": normal(tokens, d, dtype=torch.float32)}
        normed = name not in ("base", "speculative")
        arguments = (
            normal(tokens, 2 * d),
            normal(SAMPLE_SLOTS, state_len, d).transpose(1, 2),
            normal(SAMPLE_SLOTS, d, s, dtype=state_dtype),
            normal(d, width - other, dtype=weights_dtype),
            None if other else normal(d),
            normal(r + 2 * s, d) / d**0.5,
            normal(d, r) / r**0.5,
            normal(d, dtype=weights_dtype),
            -normal(d, s, dtype=torch.float32).exp(),
            normal(d, dtype=weights_dtype),
            *(normal(size, dtype=weights_dtype) if normed else None for size in (r, s, s)),
        )
        yield Sample(name, (*arguments, *plan), options)
