"""Calls of mamba3_state_update: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.mamba3_checks import CACHES
from mamba_ops.ops._common.mamba3_samples import TOKENS, caches_of, tokens_of
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.mamba3_state_update.op import mamba3_state_update
from mamba_ops.registry import ErrorInput, Sample


@mamba3_state_update.samples
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
) -> Iterator[Sample]:
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices
    sizes = {"heads": heads, "dim": dim, "dstate": dstate}

    def sample(name: str, rows: int = 3, *, groups: int = groups, **changes: Any) -> Sample:
        arguments: dict[str, Any] = tokens_of(make, rows, **sizes, groups=groups, angles=angles)
        arguments |= caches_of(make, 8, **sizes, angles=angles, dtype=state_dtype)
        arguments |= {name: normal(heads, dstate, dtype=torch.float32) for name in ("B_bias", "C_bias")}
        arguments |= {"D": normal(heads, dtype=torch.float32), "slots": indices(5, 1, 2), **changes}
        return Sample(name, tuple(arguments.pop(key) for key in (*CACHES, *TOKENS)), arguments)

    yield sample("base")
    yield Sample("no optionals", sample("bare").args)
    yield sample("gate", z=normal(3, heads, dim))
    yield sample("a group per head", groups=heads)
    yield sample("no rows", 0)
    yield sample("no slots", slots=None, null_slot=0)
    yield sample("slot table", slots=indices((5, 1), (0, 3), (7, 6), (2, 2), dtype=torch.int64))
    yield sample("null rows", slots=indices(-1, 3, -7))
    yield sample("null slot 0", slots=indices(5, 0, 2), null_slot=0)
    yield sample("rates above 0", A=normal(3, heads, dtype=torch.float32))
    yield sample("tiny steps", dt=torch.full((3, heads), 1e-30, device=device))
    other = torch.float16 if dtype != torch.float16 else torch.float32
    mixed: dict[str, Any] = {"k_state": normal(8, heads, dstate, dtype=other)}
    mixed |= {"v_state": normal(8, heads, dim, dtype=other), "angle_state": normal(8, heads, angles, dtype=other)}
    yield sample("mixed dtypes", B=normal(3, groups, dstate, dtype=other), D=normal(heads, dtype=other), **mixed)
    x, out = (normal(heads, dim, 3, dtype=d).permute(2, 0, 1) for d in (dtype, torch.float32))
    yield sample("transposed", x=x, out=out, ssm_state=normal(8, heads, dstate, dim, dtype=state_dtype).mT)
    yield sample("everything", z=normal(3, heads, dim), slots=indices((5, 1), (0, 3), (7, 6)), null_slot=0)


@mamba3_state_update.call_patterns("one token")
def _call(random: RandomInputs, pattern: str) -> Sample:
    random.lay_out(pattern)
    heads, dim, dstate = random.size("heads", 4), random.size("dim", 16), random.size("dstate", 16)
    groups, angles = random.size("groups", 2), random.size("angles", 4)
    caches = (
        random.cache(heads, angles),
        random.cache(heads, dim, dstate),
        random.cache(heads, dstate, dtype=random.dtype),
        random.cache(heads, dim, dtype=random.dtype),
    )
    x, dt, A, trap = random.tokens(heads, dim), *(random.tokens(heads) for _ in range(3))
    tokens = (x, dt, A, trap, random.tokens(angles), random.tokens(groups, dstate), random.tokens(groups, dstate))
    options = random.update_arguments({pattern}) | {"D": random.weight(heads)}
    options |= {name: random.weight(heads, dstate) for name in ("B_bias", "C_bias")}
    return Sample(pattern, (*caches, *tokens), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(4, 8\), expected \(n, heads, dim\); one token a row"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16"),
    ("base", "dt", lambda d: d[..., :2], r"got shape \(3, 2\), expected \(3, 4\); one number a token"),
    ("base", "A", lambda a: a[0], r"got shape \(4,\), expected \(3, 4\); one number a token"),
    ("base", "trap", lambda t: t.long(), "got int64, expected float16"),
    ("base", "angles", lambda a: a[..., :0], "got 0 angles, expected 1 to 6 angles"),
    ("base", "B", lambda b: b[:2], r"got shape \(2, 2, 12\), expected \(3, 2, 12\); tokens are those of x"),
    ("base", "C", lambda c: c[..., :8], r"got shape \(3, 2, 8\), expected \(3, 2, 12\); C is like B"),
    ("base", "B_bias", lambda b: b[:2], r"got shape \(2, 12\), expected \(4, 12\)"),
    ("base", "D", lambda d: d[:2], r"got shape \(2,\), expected \(4,\)"),
    ("gate", "z", lambda z: z[:1], r"got shape \(1, 4, 8\), expected \(3, 4, 8\); z is like x"),
    ("base", "angle_state", lambda s: s[..., :2], r"got shape \(8, 4, 2\), expected \(8, 4, 3\); all four caches"),
    ("base", "ssm_state", lambda s: s.mT, r"got shape \(8, 4, 12, 8\), expected \(8, 4, 8, 12\); all four caches"),
    ("base", "k_state", lambda s: s[:7], r"got shape \(7, 4, 12\), expected \(8, 4, 12\); all four caches"),
    ("base", "v_state", lambda s: s.int(), "got int32, expected float16"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("base", "out", lambda o: o[..., :4], r"got shape \(3, 4, 4\), expected \(3, 4, 8\); out is like x"),
)


@mamba3_state_update.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
