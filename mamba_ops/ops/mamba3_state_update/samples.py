"""Calls of mamba3_state_update: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.mamba3_checks import CACHES, TOKENS
from mamba_ops.ops._common.mamba3_samples import MIMO_ERRORS, caches_of, mimo_of, tokens_of
from mamba_ops.ops._common.random_inputs import UPDATE_PATTERNS, RandomInputs
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
    rank: int = 3,
) -> Iterator[Sample]:
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices
    sizes = {"heads": heads, "dim": dim, "dstate": dstate}

    def sample(name: str, *lead: int, groups: int = groups, rank: tuple[int, ...] = (), **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of one by default; of MIMO with a `rank`."""
        lead = lead or (3,)
        arguments: dict[str, Any] = tokens_of(make, *lead, **sizes, groups=groups, angles=angles, rank=rank)
        arguments |= caches_of(make, 8, **sizes, angles=angles, dtype=state_dtype, rank=rank)
        arguments |= {name: normal(heads, dstate, dtype=torch.float32) for name in ("B_bias", "C_bias")}
        arguments |= {} if not rank else mimo_of(make, *rank, **sizes, gated="z" in changes)
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
    yield sample("rows", 3, 4)
    yield sample("rows of no token", 3, 0)
    yield sample("rows, write slots", 3, 2, write_slots=indices(3, 1, -1))
    packed: dict[str, Any] = {"cu_seqlens": indices(0, 2, 2, 5)}
    yield sample("packed", 5, **packed)
    yield sample("packed, no slots", 5, **packed, slots=None, null_slot=0)
    yield sample("packed, no rows", 5, cu_seqlens=indices(0), out=normal(5, heads, dim))
    past: dict[str, Any] = {**packed, "out": normal(7, heads, dim, dtype=torch.float32)}
    yield sample("packed, tokens past the end", 7, **past)
    table = indices((5, 1, 4), (0, 3, -1), (7, 6, 2))
    speculative: dict[str, Any] = {"slots": table, "num_accepted_tokens": indices(2, 0, 3)}
    yield sample("speculative", 3, 3, **speculative)
    yield sample("speculative, one token", **speculative)
    elsewhere = indices((3, 4), (-1, 5), (6, -1), dtype=torch.int64)
    longer: dict[str, Any] = {"cu_seqlens": indices(0, 3, 5, 6), "write_slots": elsewhere}
    yield sample("speculative, packed, write slots", 6, **speculative, **longer)
    ranks, gate = (rank,), normal(3, heads, dim)
    yield sample("MIMO", rank=ranks, z=gate)
    yield sample("MIMO, a rank of 1, no slots", rank=(1,), slots=None)
    yield sample("MIMO, outputs of the rank", rank=ranks, mimo_o=None, groups=heads)
    yield sample("MIMO, rows", 3, 2, rank=ranks)
    several: dict[str, Any] = {**packed, **speculative, "out": normal(7, rank, heads, dim), "mimo_o": None}
    yield sample("MIMO, speculative, packed", 7, rank=ranks, **several)
    other = torch.float16 if dtype != torch.float16 else torch.float32
    mixed: dict[str, Any] = {"k_state": normal(8, heads, dstate, dtype=other)}
    mixed |= {"v_state": normal(8, heads, dim, dtype=other), "angle_state": normal(8, heads, angles, dtype=other)}
    yield sample("mixed dtypes", B=normal(3, groups, dstate, dtype=other), D=normal(heads, dtype=other), **mixed)
    x, out = (normal(heads, dim, 3, dtype=d).permute(2, 0, 1) for d in (dtype, torch.float32))
    yield sample("transposed", x=x, out=out, ssm_state=normal(8, heads, dstate, dim, dtype=state_dtype).mT)
    yield sample("everything", z=normal(3, heads, dim), slots=indices((5, 1), (0, 3), (7, 6)), null_slot=0)


@mamba3_state_update.call_patterns(*UPDATE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words = random.lay_out(pattern)
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
    options = random.update_arguments(words) | {"D": random.weight(heads)}
    options |= {name: random.weight(heads, dstate) for name in ("B_bias", "C_bias")}
    return Sample(pattern, (*caches, *tokens), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(4, 8\), expected \(n, heads, dim\) or \(n, length, heads, dim\)"),
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
    ("rows, write slots", "write_slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("packed", "x", lambda x: x[None], r"got shape \(1, 5, 4, 8\), expected \(tokens, heads, dim\); with cu_seqlens"),
    ("packed", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("speculative", "num_accepted_tokens", lambda a: a[:2], r"got shape \(2,\), expected \(3,\); one for each row"),
    ("speculative", "num_accepted_tokens", lambda a: a.float(), "got float32, expected int32 or int64"),
    ("speculative", "slots", lambda s: None, "got none, expected a table; num_accepted_tokens picks its column"),
    *MIMO_ERRORS,
    (
        "MIMO",
        "B",
        lambda b: b[:, 0],
        r"got shape \(3, 2, 12\), expected like x: \(\.\.\., rank, groups, dstate\), as mi",
    ),
    ("MIMO", "C", lambda c: c[:, :2], r"got shape \(3, 2, 2, 12\), expected \(3, 3, 2, 12\); C is like B"),
    ("MIMO", "k_state", lambda k: k[:, 0], r"got shape \(8, 4, 12\), expected \(8, 3, 4, 12\); all four caches"),
    ("MIMO", "mimo_o", lambda o: o[:, :2], r"got shape \(4, 2, 8\), expected \(4, 3, 8\)"),
    ("MIMO", "out", lambda o: o[:, None], r"got shape \(3, 1, 4, 8\), expected \(3, 4, 8\); out is like x"),
    ("base", "out", lambda o: o[..., :4], r"got shape \(3, 4, 4\), expected \(3, 4, 8\); out is like x"),
)


@mamba3_state_update.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
