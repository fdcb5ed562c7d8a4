"""Calls of mamba3_mixing: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.mamba3_checks import CACHES, TOKENS
from mamba_ops.ops._common.mamba3_samples import MIMO_ERRORS, caches_of, mimo_of, tokens_of
from mamba_ops.ops._common.plan_samples import SAMPLE_SLOTS, sample_plans
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.mamba3_mixing.op import mamba3_mixing
from mamba_ops.registry import ErrorInput, Sample


@mamba3_mixing.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    dim: int = 8,
    dstate: int = 12,
    groups: int = 2,
    angles: int = 3,
    chunk_size: int = 8,
    rank: int = 3,
) -> Iterator[Sample]:
    make = SampleTensors(device, dtype)
    normal = make.normal

    def sample(name: str, tokens: int, plan: Any, **changes: Any) -> Sample:
        """A call with such a plan; the one of prefills alone has other sizes."""
        ranks, more = (rank,) if name.startswith("MIMO") else (), 2 if name == "prefills" else 1
        sizes = {"heads": more * heads, "dim": dim, "dstate": more * dstate}
        given = tokens_of(make, tokens, **sizes, groups=groups, angles=more * angles, rank=ranks)
        given |= caches_of(make, SAMPLE_SLOTS, **sizes, angles=more * angles, dtype=state_dtype, rank=ranks)
        options: dict[str, Any] = {"D": normal(sizes["heads"], dtype=torch.float32)}
        of_both = {name: normal(sizes["heads"], sizes["dstate"], dtype=torch.float32) for name in ("B_bias", "C_bias")}
        options |= of_both
        options |= mimo_of(make, rank, **sizes, gated="z" in changes) if ranks else {}
        positional = (*(given[key] for key in (*TOKENS, *CACHES)), *plan, chunk_size // more)
        return Sample(name, positional, {**options, **changes})

    for name, tokens, plan, null_slot in sample_plans(device):
        options: dict[str, Any] = {"null_slot": null_slot}
        if name in ("prefills", "decodes", "speculative"):
            options["z"] = normal(tokens, 2 * heads if name == "prefills" else heads, dim)
        if name in ("padded", "decodes", "no plan"):
            options["out"] = normal(tokens, heads, dim, dtype=torch.float32)
        if name == "padding rows":
            options |= dict.fromkeys(("B_bias", "C_bias", "D"))
        yield sample(name, tokens, plan, **options)
        if name in ("base", "speculative", "rounds"):
            options |= {"z": normal(tokens, heads, dim)} if name == "base" else {"mimo_o": None}
            if name == "speculative":
                del options["z"]
                options["out"] = normal(tokens, rank, heads, dim)
            yield sample("MIMO" if name == "base" else f"MIMO, {name}", tokens, plan, **options)


@mamba3_mixing.call_patterns("mixed")
def _call(random: RandomInputs, pattern: str) -> Sample:
    heads, dim, dstate = random.size("heads", 4), random.size("dim", 16), random.size("dstate", 16)
    groups, angles, plan = random.size("groups", 2), random.size("angles", 4), random.mixed_plan()
    caches = (
        random.cache(heads, angles),
        random.cache(heads, dim, dstate),
        random.cache(heads, dstate, dtype=random.dtype),
        random.cache(heads, dim, dtype=random.dtype),
    )
    x, dt, A, trap = random.tokens(heads, dim), *(random.tokens(heads) for _ in range(3))
    tokens = (x, dt, A, trap, random.tokens(angles), random.tokens(groups, dstate), random.tokens(groups, dstate))
    options = {name: random.weight(heads, dstate) for name in ("B_bias", "C_bias")} | {"D": random.weight(heads)}
    return Sample(pattern, (*tokens, *caches, *plan, random.size("chunk_size", 32)), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[None], r"got shape \(1, 25, 4, 8\), expected \(tokens, heads, dim\)"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16"),
    ("base", "dt", lambda d: d[:, 1:], r"got shape \(25, 3\), expected \(25, 4\); one number a token and head of x"),
    ("base", "A", lambda a: a[1:], r"got shape \(24, 4\), expected \(25, 4\); one number a token and head of x"),
    ("base", "angles", lambda a: a[:, :0], "got 0 angles, expected 1 to 6 angles"),
    ("base", "B", lambda b: b[1:], r"got shape \(24, 2, 12\), expected \(25, 2, 12\); tokens are those of x"),
    ("base", "C", lambda c: c[..., 1:], r"got shape \(25, 2, 11\), expected \(25, 2, 12\); C is like B"),
    ("base", "chunk_size", lambda _: 0, "got 0, expected 1 to 4096 tokens"),
    ("base", "angle_state", lambda s: s[..., 1:], r"got shape \(9, 4, 2\), expected \(9, 4, 3\)"),
    (
        "base",
        "ssm_state",
        lambda s: s.mT,
        r"got shape \(9, 4, 12, 8\), expected \(9, 4, 8, 12\); all caches have as many",
    ),
    ("base", "k_state", lambda s: s[1:], r"got shape \(8, 4, 12\), expected \(9, 4, 12\); all caches have as many"),
    ("base", "v_state", lambda s: s.int(), "got int32, expected float16"),
    ("base", "D", lambda d: d[:, None], r"got shape \(4, 1\), expected \(4,\)"),
    ("prefills", "z", lambda z: z[1:], r"got shape \(19, 8, 8\), expected \(20, 8, 8\); z is like x"),
    *MIMO_ERRORS,
    (
        "MIMO",
        "k_state",
        lambda s: s[:, 0],
        r"got shape \(9, 4, 12\), expected \(9, 3, 4, 12\); all caches have as many",
    ),
    ("base", "counts", lambda c: c.int(), "got int32, expected int64"),
    ("base", "slots", lambda s: None, "got None with counts, expected a whole plan, or none"),
    ("base", "out", lambda o: o.flatten(1), r"got shape \(25, 32\), expected \(25, 4, 8\); out is like x"),
)


@mamba3_mixing.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
