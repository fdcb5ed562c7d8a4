"""Calls of mamba2_mixing: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.plan_samples import NARROW_ERRORS, SAMPLE_SLOTS, sample_plans, with_narrow_state
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.mamba2_mixing.op import mamba2_mixing
from mamba_ops.registry import ErrorInput, Sample


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
    normal = SampleTensors(device, dtype).normal

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
        yield from with_narrow_state(
            Sample(name, (*arguments, *plan, h, p, s, g, chunk_size // (1 + other)), options), 2
        )


@mamba2_mixing.call_patterns("mixed")
def _call(random: RandomInputs, pattern: str) -> Sample:
    heads, dim, dstate = random.size("heads", 4), random.size("dim", 8), random.size("dstate", 16)
    groups, width, plan = random.size("groups", 2), random.size("width", 4), random.mixed_plan()
    channels = heads * dim + 2 * groups * dstate
    arguments = (
        random.tokens(heads * dim + channels + heads),
        random.cache(width - 1, channels, dtype=random.dtype).transpose(1, 2),
        random.cache(heads, dim, dstate),
        random.weight(channels, width),
        None,
        *(random.weight(heads) for _ in range(3)),
    )
    return Sample(pattern, (*arguments, *plan, heads, dim, dstate, groups, random.size("chunk_size", 16)), {})


_ERROR_INPUTS = error_table(
    ("base", "dt_max", lambda m: -1.0, "dt_min: got 0.0, expected at most dt_max, which is -1.0"),
    ("base", "heads", lambda h: 0, "got 0, expected a positive number"),
    ("base", "chunk_size", lambda c: -1, "got -1, expected 1 to 4096 tokens"),
    ("base", "groups", lambda g: 3, "got 3, expected a divisor of the 4 heads"),
    ("base", "projected", lambda p: p[None], r"got shape \(1, 25, 132\), expected \(tokens, size\)"),
    ("base", "projected", lambda p: p[:, :-1], r"got shape \(25, 131\), expected \(25, 132\); gate, x, B, C and dt"),
    ("base", "projected", lambda p: p.int(), "got int32, expected float16"),
    ("base", "conv_state", lambda s: s[0], r"got shape \(96, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :8], r"got shape \(9, 8, 3\), expected \(9, 96, 3\)"),
    ("base", "conv_state", lambda s: s[..., 1:], "got state_len 2, expected at least 3"),
    ("base", "ssm_state", lambda s: s[:4], r"got shape \(4, 4, 8, 16\), expected \(9, 4, 8, 16\); both caches have as"),
    ("base", "ssm_state", lambda s: s.long(), "got int64, expected float16"),
    ("base", "conv_weight", lambda w: w[0], r"got shape \(4,\), expected \(dim, width\)"),
    ("base", "conv_weight", lambda w: w[:, :1], "got width 1, expected a width of 2 to 8"),
    ("base", "conv_bias", lambda b: b[1:], r"got shape \(95,\), expected \(96,\)"),
    ("base", "A", lambda a: a[:, None], r"got shape \(4, 1\), expected \(4,\)"),
    ("base", "dt_bias", lambda a: a[1:], r"got shape \(3,\), expected \(4,\)"),
    ("base", "counts", lambda c: None, "cu_seqlens: got a tensor without counts, expected a whole plan, or none"),
    ("base", "slots", lambda s: None, "got None with counts, expected a whole plan, or none"),
    (
        "base",
        "counts",
        lambda c: c[1:],
        "got 3 numbers, expected 4, and 2 more for each further round of prefills; dec",
    ),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "got state_len 3, expected at least 5; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "dt_min", lambda d: float("inf"), "got inf, expected at most dt_max, which is "),
    ("base", "dt_min", lambda d: -1e308, r"got -1e\+308, expected a number that float32 holds"),
    ("base", "counts", lambda c: c.int(), "got int32, expected int64"),
    ("base", "counts", lambda c: torch.tensor([2, 2, 6, 23]), "got 2 decodes and 6 prefills, expected at most 7 rows"),
    ("base", "counts", lambda c: torch.tensor([2, 2, 3, 24]), "got 26 tokens, expected at most 25; the plan is"),
    ("base", "counts", lambda c: torch.tensor([2, 3, 3, 22]), "got 3 tokens of 2 decodes, expected one each; decodes"),
    ("base", "counts", lambda c: torch.tensor([2, 2, 0, 23]), "got 23 tokens of 0 prefills, expected 0 tokens"),
    ("base", "cu_seqlens", lambda c: c[None], r"got shape \(1, 8\), expected \(n \+ 1,\)"),
    ("base", "prefill_cu_seqlens", lambda c: c[1:], r"got shape \(7,\), expected \(8,\); all tensors of a plan"),
    ("base", "slots", lambda s: s[1:], "got 6 rows, expected at least 7"),
    ("base", "has_initial_state", lambda h: h.int(), "got int32, expected bool; convert it first"),
    ("base", "has_initial_state", lambda h: h[1:], r"got shape \(6,\), expected \(7,\); all tensors"),
    ("base", "num_computed_tokens", lambda c: c.float(), "got float32, expected int32 or int64"),
    *NARROW_ERRORS,
    ("base", "out", lambda o: o.flatten(1), r"got shape \(25, 32\), expected \(25, 4, 8\)"),
)


@mamba2_mixing.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
