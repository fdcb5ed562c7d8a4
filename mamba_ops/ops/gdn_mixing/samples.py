"""Calls of gdn_mixing: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.mixing import (
    SAMPLE_SLOTS,
    sample_plans,
)
from mamba_ops.ops.gdn_mixing.op import gdn_mixing
from mamba_ops.registry import Sample


@gdn_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    num_k_heads: int = 2,
    num_v_heads: int = 4,
    head_k_dim: int = 8,
    head_v_dim: int = 12,
    width: int = 4,
) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        interleaved = name not in ("prefills", "decodes", "speculative")
        K, V, k_dim, v_dim = num_k_heads, num_v_heads, head_k_dim, head_v_dim
        if other:
            K, V, k_dim, v_dim = V, 2 * V, v_dim, k_dim
        weights_dtype = torch.float32 if other else dtype
        dim = 2 * K * k_dim + V * v_dim
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes", "no plan"):
            options |= {"z": normal(tokens, V, v_dim), "out": normal(tokens, V, v_dim, dtype=torch.float32)}
        arguments = (
            normal(tokens, dim + V * v_dim),
            normal(tokens, 2 * V),
            normal(SAMPLE_SLOTS, state_len, dim).transpose(1, 2),
            normal(SAMPLE_SLOTS, V, v_dim, k_dim, dtype=state_dtype),
            normal(dim, width - other, dtype=weights_dtype),
            normal(dim) if other else None,
            normal(V, dtype=torch.float32),
            normal(V, dtype=weights_dtype),
        )
        yield Sample(name, (*arguments, *plan, K, V, k_dim, v_dim, interleaved), options)
