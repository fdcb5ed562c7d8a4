"""Calls of chunk_kda's backward pass: those of the gated delta rule, with a decay for each channel of a key."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.samples import SampleTensors
from tests.ops.chunk_gated_delta_rule import backward_calls
from tests.training.backward import packed


def by_channel(arguments: dict[str, Any], factors: list[float] | None = None) -> dict[str, Any]:
    """The same call with other decays, (..., v_heads, k_dim); token i, channel j times factor i + j, in turns."""
    v, k_dim = arguments["v"], arguments["q"].shape[-1]
    g = -0.1 * SampleTensors(v.device, torch.float32).normal(*v.shape[:-1], k_dim).abs()
    if factors is not None:
        tokens = torch.arange(g.shape[-3], device=v.device).view(-1, 1, 1)
        turn = (tokens + torch.arange(k_dim, device=v.device)) % len(factors)
        g = g * torch.tensor(factors, device=v.device)[turn]
    return arguments | {"g": g}


def call(*lead: int, **options: Any) -> dict[str, Any]:
    """A call with tokens of shape `lead` and all that is optional, packed if there are `rows`."""
    return by_channel(backward_calls.call(*lead, **options))


def strong(*lead: int, **options: Any) -> dict[str, Any]:
    """Decays of all strengths, up to tokens that forget all."""
    return by_channel(backward_calls.call(*lead, **options), [1.0, 100.0, 1.0, 1e5, 1.0, 400.0, torch.inf])


def calls(dtype: torch.dtype, device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
    """Calls of rows with no chunk, a part of one, one, and several."""
    for arguments in backward_calls.calls(dtype, device):
        yield by_channel(arguments)
    yield strong(1, 133, k_heads=2, v_heads=2, dtype=dtype, device=device)
    yield strong(150, **packed(70, 70, 73, 145, device=device), dtype=dtype, device=device)
