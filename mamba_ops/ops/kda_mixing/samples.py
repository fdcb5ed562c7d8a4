"""Calls of kda_mixing: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.plan_samples import NARROW_ERRORS, SAMPLE_SLOTS, sample_plans, with_narrow_state
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.kda_mixing.op import kda_mixing
from mamba_ops.registry import ErrorInput, Sample


@kda_mixing.samples
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
    normal = SampleTensors(device, dtype).normal

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        K, V, k_dim, v_dim = num_k_heads, num_v_heads, head_k_dim, head_v_dim
        if other:
            K, V, k_dim, v_dim = V, 2 * V, v_dim, k_dim
        weights_dtype = torch.float32 if other else dtype
        dim = 2 * K * k_dim + V * v_dim
        state_len = width - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes", "no plan"):
            options["out"] = normal(tokens, V, v_dim, dtype=torch.float32)
        if name in ("prefills", "decodes", "speculative"):
            options["lower_bound"] = -5.0
        arguments = (
            normal(tokens, dim),
            normal(tokens, V * k_dim),
            normal(tokens, V),
            normal(SAMPLE_SLOTS, state_len, dim).transpose(1, 2),
            normal(SAMPLE_SLOTS, V, v_dim, k_dim, dtype=state_dtype),
            normal(dim, width - other, dtype=weights_dtype),
            normal(dim) if other else None,
            normal(V, dtype=torch.float32),
            normal(V, k_dim, dtype=weights_dtype),
        )
        yield from with_narrow_state(Sample(name, (*arguments, *plan, K, V, k_dim, v_dim), options), 4)


@kda_mixing.call_patterns("mixed")
def _call(random: RandomInputs, pattern: str) -> Sample:
    k_heads, heads = random.size("k_heads", 2), random.size("heads", 4)
    k_dim, dim = random.size("k_dim", 16), random.size("dim", 8)
    width, plan, channels = random.size("width", 4), random.mixed_plan(), 2 * k_heads * k_dim + heads * dim
    arguments = (
        random.tokens(channels),
        random.tokens(heads * k_dim),
        random.tokens(heads),
        random.cache(width - 1, channels, dtype=random.dtype).transpose(1, 2),
        random.cache(heads, dim, k_dim),
        random.weight(channels, width),
        None,
        random.weight(heads),
        random.weight(heads, k_dim),
    )
    return Sample(pattern, (*arguments, *plan, k_heads, heads, k_dim, dim), {})


_ERROR_INPUTS = error_table(
    ("base", "num_k_heads", lambda h: 0, "got 0, expected a positive number"),
    ("base", "head_v_dim", lambda d: -1, "got -1, expected a positive number"),
    ("base", "num_v_heads", lambda h: 3, "got 3, expected a multiple of the 2 heads of k"),
    ("base", "lower_bound", lambda b: 0.0, "got 0.0, expected a number below 0, or none"),
    ("base", "projected", lambda p: p[None], r"got shape \(1, 25, 80\), expected \(tokens, size\)"),
    ("base", "projected", lambda p: p[:, 1:], r"got shape \(25, 79\), expected \(25, 80\); q and k of 2 heads of 8, v"),
    ("base", "projected", lambda p: p.int(), "got int32, expected float16"),
    ("base", "a", lambda a: a[:, 1:], r"got shape \(25, 31\), expected \(25, 32\); a number a head of v and channel"),
    ("base", "b", lambda b: b[1:], r"got shape \(24, 4\), expected \(25, 4\); a number a head of v"),
    ("base", "conv_state", lambda s: s[:, :8], r"got shape \(9, 8, 3\), expected \(9, 80, 3\)"),
    ("base", "conv_state", lambda s: s[..., 1:], "got state_len 2, expected at least 3"),
    ("base", "ssm_state", lambda s: s.mT, r"got shape \(9, 4, 8, 12\), expected \(9, 4, 12, 8\); both caches"),
    ("base", "conv_weight", lambda w: w[:, :1], "got width 1, expected a width of 2 to 8"),
    ("prefills", "conv_bias", lambda b: b[1:], r"got shape \(159,\), expected \(160,\)"),
    ("base", "A_log", lambda a: a[:, None], r"got shape \(4, 1\), expected \(4,\)"),
    ("base", "dt_bias", lambda a: a.flatten(), r"got shape \(32,\), expected \(4, 8\)"),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "got state_len 3, expected at least 5; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "counts", lambda c: c.int(), "got int32, expected int64"),
    ("base", "slots", lambda s: None, "got None with counts, expected a whole plan, or none"),
    *NARROW_ERRORS,
    ("base", "out", lambda o: o.flatten(1), r"got shape \(25, 48\), expected \(25, 4, 12\)"),
)


@kda_mixing.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
