"""Calls of gated_delta_rule_update: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops.gated_delta_rule_update.op import gated_delta_rule_update
from mamba_ops.registry import Sample


@gated_delta_rule_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(name: str, *lead: int, k_heads: int = k_heads, raw: bool = True, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of one by default; q, k, v are parts of one tensor."""
        lead = lead or (3,)
        keys, values = k_heads * k_dim, v_heads * v_dim
        q, k, v = normal(*lead, 2 * keys + values).split([keys, keys, values], dim=-1)
        arguments = {
            "ssm_state": normal(9, v_heads, v_dim, k_dim, dtype=state_dtype),
            "q": q.unflatten(-1, (k_heads, k_dim)),
            "k": k.unflatten(-1, (k_heads, k_dim)),
            "v": v.unflatten(-1, (v_heads, v_dim)),
            "slots": indices(5, 1, 2),
            "qk_l2norm": True,
        }
        if raw:
            gate = {"a": normal(*lead, v_heads), "b": normal(*lead, v_heads)}
            weights = {n: normal(v_heads, dtype=torch.float32) for n in ("A_log", "dt_bias")}
            arguments |= {**gate, **weights}
        else:
            g, beta = -normal(*lead, v_heads, dtype=torch.float32).abs(), 2 * normal(*lead, v_heads).sigmoid()
            arguments |= {"g": g, "beta": beta}
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("ssm_state", "q", "k", "v")), arguments)

    packed: dict[str, Any] = {"cu_seqlens": indices(0, 2, 2, 5)}
    table = indices((1, 2, 3), (4, 5, 6), (-1, 7, 0), dtype=torch.int64)
    wide = normal(9, v_heads * v_dim * k_dim + 16, dtype=state_dtype)[:, 8:-8].view(9, v_heads, v_dim, k_dim)
    turned = normal(9, v_heads, k_dim, v_dim, dtype=state_dtype).transpose(2, 3)
    yield sample("base")
    yield sample("gates given", raw=False, slots=None, null_slot=0, k_heads=1, scale=0.3)
    zero = normal(3, k_heads, k_dim) * indices(0, 1, 1).view(3, 1, 1).to(dtype)
    yield sample("a few tokens, padded slots, a zero q", 3, 2, ssm_state=wide, q=zero[:, None].expand(-1, 2, -1, -1))
    short = {"raw": False, "beta": normal(3, v_heads).sigmoid(), "k": normal(3, k_heads, k_dim) / k_dim**0.5}
    yield sample("not normalised, turned state", ssm_state=turned, qk_l2norm=False, **short)
    moved: dict[str, Any] = {"slots": indices(-1, 0, 3), "write_slots": indices(6, 4, 7), "null_slot": 7}
    yield sample("null rows, write slots", **moved)
    v, out = (normal(v_heads, v_dim, 7, dtype=d).permute(2, 0, 1) for d in (dtype, torch.float32))
    yield sample("packed, empty row", 7, **packed, write_slots=indices(5, 7, 2), v=v, out=out)
    a = normal(6, v_heads) * 30
    speculative: dict[str, Any] = {"cu_seqlens": indices(0, 3, 5, 6), "num_accepted_tokens": indices(2, 1, 5)}
    yield sample("speculative", 6, a=a, b=-a, slots=table.abs(), null_slot=0, **speculative)
    written: dict[str, Any] = {"slots": table[:, :2], "write_slots": table.flip(1), "k_heads": v_heads}
    yield sample("speculative, write slots", 3, 2, num_accepted_tokens=indices(0, 2, 1), **written)
