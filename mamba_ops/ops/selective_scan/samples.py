"""Calls of selective_scan: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.random_inputs import SEQUENCE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.selective_scan.op import selective_scan
from mamba_ops.registry import ErrorInput, Sample


@selective_scan.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    dim: int = 24,
    dstate: int = 8,
    groups: int = 2,
    length: int = 37,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each; rows have two pieces and a bit."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices
    tokens = 2 * length + 3

    def sample(
        name: str, *lead: int, groups: tuple[int, ...] = (groups,), dstate: int = dstate, **changes: Any
    ) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default."""
        lead = lead or (3, length)
        arguments = {
            "x": normal(*lead, dim),
            "dt": normal(*lead, dim),
            "A": -normal(dim, dstate, dtype=torch.float32).exp(),
            "B": normal(*lead, *groups, dstate),
            "C": normal(*lead, *groups, dstate),
            "D": normal(dim, dtype=torch.float32),
            "z": normal(*lead, dim),
            "dt_bias": normal(dim, dtype=torch.float32),
            "dt_softplus": True,
            "ssm_state": normal(8, dim, dstate, dtype=state_dtype),
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("x", "dt", "A", "B", "C")), arguments)

    initial: dict[str, Any] = {"has_initial_state": indices(True, False, True, dtype=torch.bool)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    yield sample("base", **initial)
    yield Sample("no optionals", tuple(a.abs() if i == 1 else a for i, a in enumerate(sample("bare").args)))
    large = normal(2, length, dim) * 20
    yield sample("dt and gate of any size", 2, length, groups=(), dt=large, dt_bias=None, z=large)
    strided = normal(3, dim, length).transpose(1, 2)
    padded = normal(8, dim * dstate + 24, dtype=state_dtype)[:, 8:-16].view(8, dim, dstate)
    major: dict[str, Any] = {"x": strided, "z": strided.flip(0)}
    major["out"] = normal(3, dim, length, dtype=torch.float32).transpose(1, 2)
    yield sample("channel-major, padded slots", groups=(1,), ssm_state=padded, **major, **initial)
    yield sample("no slots", 3, 2, dstate=2 * dstate - 1, slots=None, null_slot=0, D=None, **initial)
    yield sample("words of four states", 3, 5, dstate=4, **initial)
    moved: dict[str, Any] = {"write_slots": indices(4, 7, 0, 9), "null_slot": 7}
    empty: dict[str, Any] = {"cu_seqlens": indices(0, length, length, tokens, dtype=torch.int64)}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, groups=(), **moved, **packed, **initial)
    out = normal(tokens + 4, dim, dtype=torch.float32)
    yield sample("packed, empty row", tokens + 4, write_slots=indices(4, 3, 0), out=out, **empty, **initial)

    long: dict[str, Any] = {"cu_seqlens": indices(0, 135, 140, 205), "write_slots": indices(3, 4, 7)}
    yield sample("packed, long", 205, groups=(1,), **long, **initial)
    yield sample("everything", tokens + 4, write_slots=indices(4, 3, 0), **packed, **initial)
    stateless: dict[str, Any] = {"ssm_state": None, "slots": None, "write_slots": indices(3, 2, 4)}
    yield sample("write slots without states", 70, cu_seqlens=indices(0, 0, 68, 70), **stateless)

    # A row of 37 tokens whose first 5 end block 1; one of 3 tokens; one of 37, 12 of them at the end of block 1.
    table = indices((1, 2, 3, 4, 5), (6, -1, 6, 6, 6), (7, 0, 8, -1, 9), dtype=torch.int64)
    ends = indices(5, 21, 37, 40, 52, 56, 77)
    prefix: dict[str, Any] = {
        "ssm_state": normal(10, dim, dstate, dtype=state_dtype),
        "slots": table,
        "block_size": 16,
        "first_block": indices(1, 0, 1),
        "last_block": indices(4, 0, 4),
        "initial_block": indices(0, 1, 0),
        "chunk_ends": ends,
        "last_chunk": indices(2, 3, 6),
    }
    if length == 37:
        yield sample("prefix cache", tokens, **packed, **initial, **prefix)


@selective_scan.call_patterns(*SEQUENCE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, dim, dstate = random.lay_out(pattern), random.size("channels", 64), random.size("dstate", 16)
    options = random.sequence_arguments(words)
    options |= {"D": random.weight(dim), "z": random.tokens(dim), "dt_bias": random.weight(dim), "dt_softplus": True}
    if "cached" in words:
        options["ssm_state"] = random.cache(dim, dstate)
    x, dt, B, C = random.tokens(dim), random.tokens(dim), random.tokens(dstate), random.tokens(dstate)
    return Sample(pattern, (x, dt, random.weight(dim, dstate), B, C), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(37, 24\), expected \(n, length, dim\); packed tokens come"),
    ("packed, long", "x", lambda x: x[None], r"got shape \(1, 205, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16"),
    ("base", "dt", lambda d: d[..., :1], r"got shape \(3, 37, 1\), expected \(3, 37, 24\); dt is like x"),
    ("base", "dt", lambda d: d.bool(), "got bool, expected float16"),
    ("base", "A", lambda a: a[:, 0], r"got shape \(24,\), expected \(dim, dstate\)"),
    ("base", "A", lambda a: a[:3], r"got shape \(3, 8\), expected \(24, 8\); one row a channel of x"),
    ("base", "A", lambda a: a[:, :0], r"got shape \(24, 0\), expected no size of 0"),
    ("base", "B", lambda b: b[0, 0], r"got shape \(2, 8\), expected \(..., dstate\) or \(..., groups, dstate\)"),
    ("base", "B", lambda b: b[:, 1:], r"got shape \(3, 36, 2, 8\), expected \(3, 37, 8\) or \(3, 37, 2, 8\); tokens"),
    (
        "base",
        "B",
        lambda b: b.repeat(1, 1, 4, 1)[:, :, :5],
        r"C: got shape \(3, 37, 2, 8\), expected \(3, 37, 5, 8\); C is like B",
    ),
    ("base", "C", lambda c: c[:1], r"got shape \(1, 37, 2, 8\), expected \(3, 37, 2, 8\); C is like B"),
    ("base", "D", lambda d: d[1:], r"got shape \(23,\), expected \(24,\)"),
    ("base", "z", lambda z: z[:, 1:], r"got shape \(3, 36, 24\), expected \(3, 37, 24\); z is like x"),
    ("base", "dt_bias", lambda b: b[None], r"got shape \(1, 24\), expected \(24,\)"),
    ("packed, long", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("packed, long", "cu_seqlens", lambda c: c.float(), "got float32, expected int32 or int64"),
    ("base", "ssm_state", lambda s: s[..., 1:], r"got shape \(8, 24, 7\), expected \(8, 24, 8\); \(slots"),
    ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16"),
    ("base", "ssm_state", lambda s: None, "got none, expected a cache; has_initial_state says which rows"),
    ("no slots", "ssm_state", lambda s: s[:2], "got 2 slots, expected at least 3; without slots, row i uses slot i"),
    ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("packed, long", "write_slots", lambda s: s[:1], "got 1 rows, expected at least 3"),
    ("base", "has_initial_state", lambda h: h.int(), "got int32, expected bool"),
    ("base", "has_initial_state", lambda h: h[:2], r"got shape \(2,\), expected \(3,\); one for"),
    ("base", "block_size", lambda b: -1, r"got -1, expected 0 or a number of tokens below 2\*\*31"),
    ("base", "block_size", lambda b: 2**62, r"got 4611686018427387904, expected 0 or a number of tokens below 2\*\*31"),
    ("prefix cache", "block_size", lambda b: 0, "first_block: got a tensor, expected none without block_size"),
    ("base", "block_size", lambda b: 16, "cu_seqlens: got none, expected a tensor with block_size; the prefix cache"),
    ("prefix cache", "last_chunk", lambda c: None, "got none, expected a tensor with block_size; the prefix"),
    ("prefix cache", "chunk_ends", lambda c: c[None], r"got shape \(1, 7\), expected \(chunks,\)"),
    ("prefix cache", "chunk_ends", lambda c: c.float(), "got float32, expected int32 or int64"),
    ("prefix cache", "first_block", lambda b: b[1:], r"got shape \(2,\), expected \(3,\)"),
    ("prefix cache", "slots", lambda s: s[:, 0], r"got shape \(3,\), expected \(n, positions\), one column a"),
    ("base", "out", lambda o: o[..., 1:], r"got shape \(3, 37, 23\), expected \(3, 37, 24\); out is like x"),
)


@selective_scan.error_inputs
def _error_inputs(device: torch.device) -> Iterator[ErrorInput]:
    yield from _ERROR_INPUTS
    yield ErrorInput(
        "prefix cache",
        "write_slots",
        lambda _: torch.zeros(3, dtype=torch.int64, device=device),
        "write_slots: got a tensor, expected none with block_size; slots has the columns",
    )
