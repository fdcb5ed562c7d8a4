"""Calls of short_conv_mixing: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.plan_samples import SAMPLE_SLOTS, sample_plans
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.short_conv_mixing.op import short_conv_mixing
from mamba_ops.registry import ErrorInput, Sample


@short_conv_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    dim: int = 24,
    width: int = 3,
) -> Iterator[Sample]:
    normal = SampleTensors(device, dtype).normal

    for name, tokens, plan, null_slot in sample_plans(device):
        other = name == "prefills"  # there every argument that can be another is
        channels = dim // 2 if other else dim
        weights_dtype = torch.float32 if other else dtype
        taps = width + other
        state_len = taps - 1 + (2 if plan.num_accepted_tokens is not None else 0)
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("padded", "decodes"):
            options |= {"out": normal(tokens, channels, dtype=torch.float32)}
        arguments = (
            normal(tokens, 3 * channels),
            normal(SAMPLE_SLOTS, state_len, channels, dtype=state_dtype).transpose(1, 2),
            normal(channels, taps, dtype=weights_dtype),
            normal(channels) if other or name == "decodes" else None,
        )
        yield Sample(name, (*arguments, *plan), options)


@short_conv_mixing.call_patterns("mixed")
def _call(random: RandomInputs, pattern: str) -> Sample:
    dim, width, plan = random.size("dim", 24), random.size("width", 4), random.mixed_plan()
    arguments = (
        random.tokens(3 * dim),
        random.cache(width - 1, dim, dtype=random.dtype).transpose(1, 2),
        random.weight(dim, width),
        None,
    )
    return Sample(pattern, (*arguments, *plan), {})


_ERROR_INPUTS = error_table(
    ("base", "projected", lambda p: p[None], r"got shape \(1, 25, 72\), expected \(tokens, 3 \* dim\)"),
    ("base", "projected", lambda p: p[:, 1:], r"got shape \(25, 71\), expected \(tokens, 3 \* dim\); B, C and x of"),
    ("base", "projected", lambda p: p[:, :0], r"got shape \(25, 0\), expected \(tokens, 3 \* dim\)"),
    ("base", "projected", lambda p: p.int(), "got int32, expected float16"),
    ("base", "conv_state", lambda s: s[0], r"got shape \(24, 2\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :8], r"got shape \(9, 8, 2\), expected \(9, 24, 2\)"),
    ("base", "conv_state", lambda s: s[..., 1:], "got state_len 1, expected at least 2"),
    ("base", "conv_state", lambda s: s[:0], "got 0 slots, expected 1 at least; a plan's rows have their states there"),
    ("base", "conv_state", lambda s: s.long(), "got int64, expected float16"),
    ("base", "conv_weight", lambda w: w[0], r"got shape \(3,\), expected \(dim, width\)"),
    ("base", "conv_weight", lambda w: w[1:], r"got shape \(23, 3\), expected \(24, 3\)"),
    ("base", "conv_weight", lambda w: w[:, :1], "got width 1, expected a width of 2 to 8"),
    ("decodes", "conv_bias", lambda b: b[1:], r"got shape \(23,\), expected \(24,\)"),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "got state_len 2, expected at least 4; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "counts", lambda c: None, "cu_seqlens: got a tensor without counts, expected a whole plan, or none"),
    ("base", "counts", lambda c: c.int(), "got int32, expected int64"),
    ("base", "counts", lambda c: torch.tensor([2, 2, 3, 24]), "got 26 tokens, expected at most 25; the plan is"),
    ("base", "slots", lambda s: None, "got None with counts, expected a whole plan, or none"),
    ("base", "slots", lambda s: s[1:], "got 6 rows, expected at least 7"),
    ("base", "out", lambda o: o[:, 1:], r"got shape \(25, 23\), expected \(25, 24\)"),
)


@short_conv_mixing.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
