"""Calls of chunk_gated_delta_rule's backward pass."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.samples import SampleTensors
from tests.training.backward import packed

TOKENS = ("q", "k", "v", "g", "beta")


def call(
    *lead: int,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 8,
    v_dim: int = 12,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> dict[str, Any]:
    """A call with tokens of shape `lead` and all that is optional, packed if there are `rows`."""
    make = SampleTensors(torch.device(device), dtype)
    normal = make.normal
    n = lead[0] if rows is None else rows
    return {
        "q": normal(*lead, k_heads, k_dim),
        "k": normal(*lead, k_heads, k_dim),
        "v": normal(*lead, v_heads, v_dim),
        "g": -0.1 * normal(*lead, v_heads, dtype=torch.float32).abs(),
        "beta": normal(*lead, v_heads).sigmoid(),
        "initial_states": normal(n, v_heads, v_dim, k_dim, dtype=torch.float32),
        "cu_seqlens": None,
        "scale": None,
        "qk_l2norm": True,
        "grad_output": normal(*lead, v_heads, v_dim),
        "grad_final_states": normal(n, v_heads, v_dim, k_dim, dtype=torch.float32),
    } | changes


def strong(*lead: int, **options: Any) -> dict[str, Any]:
    """Decays of all strengths, up to tokens that forget all."""
    arguments = call(*lead, **options)
    factors = torch.tensor([1.0, 100.0, 1.0, 1e5, 1.0, 400.0, torch.inf], device=arguments["g"].device)
    g = arguments["g"].flatten(0, 1)
    return arguments | {"g": (g * factors.repeat(g.shape[0])[: g.shape[0], None]).view_as(arguments["g"])}


def calls(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Calls of rows with no chunk, a part of one, one, and several."""
    at: dict[str, Any] = {"dtype": dtype, "device": device}
    yield call(2, 75, **at)
    keys = call(2, 9, **at)["k"] / 3
    none: dict[str, Any] = {"initial_states": None, "grad_final_states": None}
    yield call(2, 9, k=keys, qk_l2norm=False, scale=0.3, **none, **at)
    yield call(1, 64, k_heads=1, v_heads=3, **at)
    yield strong(1, 133, k_heads=2, v_heads=2, **at)
    turned = call(1, 70, **at)
    yield turned | {
        n: turned[n].transpose(1, 2).contiguous().transpose(1, 2) for n in ("k", "v", "beta", "grad_output")
    }
    yield call(150, **packed(70, 70, 73, 145, device=device), **at)
