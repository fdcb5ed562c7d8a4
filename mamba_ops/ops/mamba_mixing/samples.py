"""Calls of mamba_mixing: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.plan_samples import NARROW_ERRORS, SAMPLE_SLOTS, sample_plans, with_narrow_state
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.mamba_mixing.op import mamba_mixing
from mamba_ops.registry import ErrorInput, Sample


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
    normal = SampleTensors(device, dtype).normal

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
        yield from with_narrow_state(Sample(name, (*arguments, *plan), options), 2)


@mamba_mixing.call_patterns("mixed")
def _call(random: RandomInputs, pattern: str) -> Sample:
    dim, dstate, rank = random.size("inner", 24), random.size("dstate", 16), random.size("dt_rank", 5)
    width, plan, dtype = random.size("width", 4), random.mixed_plan(), random.dtype
    arguments = (
        random.tokens(2 * dim),
        random.cache(width - 1, dim, dtype=dtype).transpose(1, 2),
        random.cache(dim, dstate),
        random.weight(dim, width),
        None,
        random.weight(rank + 2 * dstate, dim, dtype=dtype),
        random.weight(dim, rank, dtype=dtype),
        random.weight(dim),
        random.weight(dim, dstate),
        random.weight(dim),
        *(None, None, None),
    )
    return Sample(pattern, (*arguments, *plan), {})


_ERROR_INPUTS = error_table(
    ("base", "A", lambda A: A[:, :0], r"got shape \(24, 0\), expected \(inner, dstate\), neither of them 0"),
    ("base", "A", lambda a: a[0], r"got shape \(8,\), expected \(inner, dstate\)"),
    ("base", "dt_proj_weight", lambda w: w[0], r"got shape \(5,\), expected \(inner, dt_rank\)"),
    ("base", "dt_proj_weight", lambda w: w[1:], r"got shape \(23, 5\), expected \(24, 5\)"),
    ("base", "projected", lambda p: p[None], r"got shape \(1, 25, 48\), expected \(tokens, size\)"),
    ("base", "projected", lambda p: p[:, 1:], r"got shape \(25, 47\), expected \(25, 48\); x and gate of 24 channels"),
    ("base", "projected", lambda p: p.int(), "got int32, expected float16"),
    ("base", "x_proj_weight", lambda w: w[1:], r"got shape \(20, 24\), expected \(21, 24\); to dt, B and C"),
    ("base", "x_proj_weight", lambda w: w.double(), "got float64, expected bfloat16, as projected; convert it once,"),
    ("base", "dt_proj_weight", lambda w: w.double(), "got float64, expected bfloat16, as projected; convert it once,"),
    ("base", "dt_proj_bias", lambda b: b[1:], r"got shape \(23,\), expected \(24,\)"),
    ("base", "D", lambda d: d[None], r"got shape \(1, 24\), expected \(24,\)"),
    ("prefills", "dt_norm_weight", lambda w: w[1:], r"got shape \(6,\), expected \(7,\)"),
    ("prefills", "B_norm_weight", lambda w: w[1:], r"got shape \(15,\), expected \(16,\)"),
    ("prefills", "C_norm_weight", lambda w: w.long(), "got int64, expected float16"),
    ("base", "conv_state", lambda s: s[..., 1:], "got state_len 2, expected at least 3"),
    ("base", "ssm_state", lambda s: s[:4], r"got shape \(4, 24, 8\), expected \(9, 24, 8\); both caches have as"),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "got state_len 3, expected at least 5; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "counts", lambda c: c.int(), "got int32, expected int64"),
    ("base", "slots", lambda s: None, "got None with counts, expected a whole plan, or none"),
    *NARROW_ERRORS,
    ("base", "out", lambda o: o[:, 1:], r"got shape \(25, 23\), expected \(25, 24\)"),
)


@mamba_mixing.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
