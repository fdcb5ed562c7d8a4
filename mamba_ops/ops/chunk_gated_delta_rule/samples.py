"""Calls of chunk_gated_delta_rule: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops.chunk_gated_delta_rule.op import chunk_gated_delta_rule
from mamba_ops.registry import Sample


@chunk_gated_delta_rule.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
    length: int = 75,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each; rows have a chunk and a bit."""
    random = torch.Generator().manual_seed(0)
    tokens = 2 * length + 3

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(name: str, *lead: int, k_heads: int = k_heads, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default; q, k, v are parts of one tensor."""
        lead = lead or (3, length)
        keys, values = k_heads * k_dim, v_heads * v_dim
        q, k, v = normal(*lead, 2 * keys + values).split([keys, keys, values], dim=-1)
        arguments = {
            "q": q.unflatten(-1, (k_heads, k_dim)),
            "k": k.unflatten(-1, (k_heads, k_dim)),
            "v": v.unflatten(-1, (v_heads, v_dim)),
            "g": -0.1 * normal(*lead, v_heads, dtype=torch.float32).abs(),  # the last token still knows the first
            "beta": normal(*lead, v_heads).sigmoid(),
            "ssm_state": normal(9, v_heads, v_dim, k_dim, dtype=state_dtype),
            "slots": indices(5, 1, 2),
            "qk_l2norm": True,
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("q", "k", "v", "g", "beta")), arguments)

    initial: dict[str, Any] = {"has_initial_state": torch.tensor((True, False, True), device=device)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    empty: dict[str, Any] = {
        "cu_seqlens": indices(0, length, length, length, tokens, dtype=torch.int64),
        "slots": indices(5, 1, 2, 6),
        "write_slots": indices(4, 1, 3, 0),
        "has_initial_state": torch.tensor((True, False, True, True), device=device),
    }
    wide = normal(9, v_heads * v_dim * k_dim + 16, dtype=state_dtype)[:, 8:-8].view(9, v_heads, v_dim, k_dim)
    turned = normal(9, v_heads, k_dim, v_dim, dtype=state_dtype).transpose(2, 3)
    doubled, strong = 2 * normal(1, length, v_heads).sigmoid(), -40 * normal(1, length, v_heads).abs()
    yield sample("base", **initial)
    short = {"qk_l2norm": False, "scale": 0.3, "k": normal(2, 9, k_heads, k_dim) / k_dim**0.5}
    yield Sample("no cache", sample("bare", 2, 9).args, {"qk_l2norm": True})
    yield sample("not normalised, no slots", 2, 9, **short, slots=None, null_slot=0)
    yield sample("negative eigenvalues", 1, length, beta=doubled, k_heads=1, ssm_state=turned)
    yield sample("strong decay", 1, length, g=strong, k_heads=v_heads, ssm_state=wide)
    channel_major = normal(v_heads, v_dim, tokens).permute(2, 0, 1)
    moved: dict[str, Any] = {"write_slots": indices(7, -1, 0, 8), "null_slot": 7, "v": channel_major}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, **moved, **packed, **initial)
    out = normal(v_heads, v_dim, tokens + 4, dtype=torch.float32).permute(2, 0, 1)
    yield sample("packed, empty rows", tokens + 4, out=out, **empty)
