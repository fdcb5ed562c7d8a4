"""Calls of mamba3_chunk_scan: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.mamba3_checks import TOKENS
from mamba_ops.ops._common.mamba3_samples import MIMO_ERRORS, caches_of, mimo_of, tokens_of
from mamba_ops.ops._common.random_inputs import SEQUENCE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.mamba3_chunk_scan.op import mamba3_chunk_scan
from mamba_ops.registry import ErrorInput, Sample


@mamba3_chunk_scan.samples
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
    """Yield the base call, then calls that change one thing each; rows have two and a half chunks."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices
    length = 5 * chunk_size // 2
    tokens = 2 * length + 3
    sizes = {"heads": heads, "dim": dim, "dstate": dstate}

    def caches(rank: tuple[int, ...] = ()) -> dict[str, Any]:
        return caches_of(make, 8, **sizes, angles=angles, dtype=state_dtype, rank=rank)

    def sample(
        name: str, *lead: int, groups: int = groups, angles: int = angles, rank: tuple[int, ...] = (), **changes: Any
    ) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default; of MIMO with a `rank`."""
        lead = lead or (3, length)
        arguments: dict[str, Any] = tokens_of(make, *lead, **sizes, groups=groups, angles=angles, rank=rank)
        arguments |= {"chunk_size": chunk_size, "D": normal(heads, dtype=torch.float32)}
        arguments |= {name: normal(heads, dstate, dtype=torch.float32) for name in ("B_bias", "C_bias")}
        arguments |= {} if not rank else mimo_of(make, *rank, **sizes, gated="z" in changes)
        arguments |= {**caches(rank), "slots": indices(5, 1, 2), **changes}
        return Sample(name, tuple(arguments.pop(key) for key in (*TOKENS, "chunk_size")), arguments)

    initial: dict[str, Any] = {"has_initial_state": indices(True, False, True, dtype=torch.bool)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}

    yield sample("base", **initial)
    yield Sample("no optionals", sample("bare").args)
    yield sample("from zero")
    yield sample("gate", z=normal(3, length, heads, dim), **initial)
    yield sample("a group per head", groups=heads)
    yield sample("odd chunks", 1, length, slots=indices(5), chunk_size=3)
    yield sample("one token", 3, 1, **initial)
    yield sample("no rows", 0, length)
    yield sample("packed, no rows", length, cu_seqlens=indices(0))
    yield sample("rows of no token", 3, 0, **initial)
    yield sample("no slots", slots=None, null_slot=0, **initial)
    yield sample("slot table", slots=indices((5, 1), (0, 3), (7, 6), (2, 2), dtype=torch.int64), **initial)
    yield sample("null rows", slots=indices(-1, 3, -7), **initial)
    yield sample("null slot 0", slots=indices(5, 0, 2), null_slot=0, **initial)
    yield sample("rates above 0", A=normal(3, length, heads, dtype=torch.float32), **initial)
    yield sample("tiny steps", dt=torch.full((3, length, heads), 1e-30, device=device), **initial)
    moved = indices(3, 1, -1)
    yield sample("write slots", write_slots=moved, **initial)
    yield sample("rows of no token, write slots", 3, 0, write_slots=indices(3, 4, 6), **initial)
    yield sample("packed", tokens, **packed)
    yield sample("packed, initial states", tokens, **packed, **initial)
    yield sample("packed, empty rows", length, cu_seqlens=indices(0, 0, length, length, dtype=torch.int64), **initial)
    ends: dict[str, Any] = {"cu_seqlens": indices(0, 0, length, length), "write_slots": indices(6, 7, 2)}
    yield sample("packed, empty rows, write slots", length, **ends, **initial)
    past = {**packed, "out": normal(tokens + 5, heads, dim)}
    yield sample("packed, tokens past the end", tokens + 5, **past, **initial)
    bare: dict[str, Any] = dict.fromkeys((*caches(), "slots"))
    yield sample("packed, no caches", tokens, **packed, **bare)
    bounds = indices(0, 9 * chunk_size, 9 * chunk_size + 1, 17 * chunk_size + 3)  # more than a kernel's chunk of 64
    many: dict[str, Any] = {"cu_seqlens": bounds}
    yield sample("packed, more chunks", 17 * chunk_size + 3, **many, **initial)
    ranks = (rank,)
    gate: dict[str, Any] = {"z": normal(3, length, heads, dim)}
    yield sample("MIMO", rank=ranks, **gate, **initial)
    yield sample("MIMO, a rank of 1, no caches", 3, length, rank=(1,), **bare)
    all_outputs: dict[str, Any] = {"mimo_o": None, "out": normal(tokens + 5, rank, heads, dim)}
    yield sample("MIMO, packed, outputs of the rank", tokens + 5, rank=ranks, **all_outputs, **packed, **initial)
    yield sample("MIMO, write slots", 3, chunk_size, rank=ranks, groups=heads, chunk_size=1, write_slots=moved)
    yield sample("float32 output", out=normal(3, length, heads, dim, dtype=torch.float32))
    other = torch.float16 if dtype != torch.float16 else torch.float32
    mixed: dict[str, Any] = {name: normal(3, length, groups, dstate, dtype=other) for name in ("B", "C")}
    yield sample("mixed dtypes", **mixed, D=normal(heads, dtype=other))
    x, out = (normal(3, heads, dim, length, dtype=d).permute(0, 3, 1, 2) for d in (dtype, torch.float32))
    yield sample("transposed activations", x=x, out=out, **initial)
    yield sample(
        "everything",
        tokens + 5,
        **packed,
        **initial,
        z=normal(tokens + 5, heads, dim),
        slots=indices((5, 1), (0, 3), (7, 6)),
        null_slot=0,
        chunk_size=5,
        out=normal(tokens + 5, heads, dim),
    )


@mamba3_chunk_scan.call_patterns(*SEQUENCE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, heads, dim = random.lay_out(pattern), random.size("heads", 4), random.size("dim", 16)
    dstate, groups, angles = random.size("dstate", 16), random.size("groups", 2), random.size("angles", 4)
    options = random.sequence_arguments(words) | {"D": random.weight(heads)}
    options |= {name: random.weight(heads, dstate) for name in ("B_bias", "C_bias")}
    if "cached" in words:
        options |= {"angle_state": random.cache(heads, angles), "ssm_state": random.cache(heads, dim, dstate)}
        options |= {"k_state": random.cache(heads, dstate, dtype=random.dtype)}
        options |= {"v_state": random.cache(heads, dim, dtype=random.dtype)}
    x, dt, A, trap = random.tokens(heads, dim), *(random.tokens(heads) for _ in range(3))
    tokens = (x, dt, A, trap, random.tokens(angles), random.tokens(groups, dstate), random.tokens(groups, dstate))
    return Sample(pattern, (*tokens, random.size("chunk_size", 32)), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(20, 4, 8\), expected \(n, length, heads, dim\); packed tokens come"),
    ("packed", "x", lambda x: x[None], r"got shape \(1, 43, 4, 8\), expected \(tokens, heads, dim\); with cu_seqlens"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16"),
    ("base", "x", lambda x: x[..., :0], r"got shape \(3, 20, 4, 0\), expected only tokens of size 0"),
    ("base", "dt", lambda d: d[..., :2], r"got shape \(3, 20, 2\), expected \(3, 20, 4\); one number a token"),
    ("base", "A", lambda a: a[0, 0], r"got shape \(4,\), expected \(3, 20, 4\); one number a token"),
    ("base", "trap", lambda t: t.long(), "got int64, expected float16"),
    ("base", "angles", lambda a: a[..., None, :], r"got shape \(3, 20, 1, 3\), expected \(..., angles\), one set"),
    ("base", "angles", lambda a: a[..., :0], "got 0 angles, expected 1 to 6 angles"),
    ("base", "angles", lambda a: a.repeat(1, 1, 3), "got 9 angles, expected 1 to 6 angles, one for a pair of the 12"),
    ("base", "B", lambda b: b[:, :9], r"got shape \(3, 9, 2, 12\), expected \(3, 20, 2, 12\); tokens are those of x"),
    ("base", "C", lambda c: c[..., :8], r"got shape \(3, 20, 2, 8\), expected \(3, 20, 2, 12\); C is like B"),
    ("base", "chunk_size", lambda _: 0, "got 0, expected 1 to 4096 tokens"),
    ("base", "B_bias", lambda b: b[:2], r"got shape \(2, 12\), expected \(4, 12\)"),
    ("base", "C_bias", lambda b: b[0], r"got shape \(12,\), expected \(4, 12\)"),
    ("base", "D", lambda d: d[:2], r"got shape \(2,\), expected \(4,\)"),
    ("gate", "z", lambda z: z[:1], r"got shape \(1, 20, 4, 8\), expected \(3, 20, 4, 8\); z is like x"),
    *MIMO_ERRORS,
    (
        "MIMO",
        "B",
        lambda b: b[:, :, 0],
        r"got shape \(3, 20, 2, 12\), expected like x: \(\.\.\., rank, groups, dstate\), as",
    ),
    ("MIMO", "k_state", lambda k: k[:, 0], r"got shape \(8, 4, 12\), expected \(8, 3, 4, 12\); all four caches"),
    (
        "MIMO, packed, outputs of the rank",
        "out",
        lambda o: o[:, 0],
        r"got shape \(48, 4, 8\), expected \(48, 3, 4, 8\); out has the rank's outputs, as mimo_o is none",
    ),
    ("packed", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("base", "angle_state", lambda s: s[..., :2], r"got shape \(8, 4, 2\), expected \(8, 4, 3\); all four caches"),
    ("base", "ssm_state", lambda s: s[:4], r"angle_state: got shape \(8, 4, 3\), expected \(4, 4, 3\); all four"),
    ("base", "ssm_state", lambda s: s.mT, r"got shape \(8, 4, 12, 8\), expected \(8, 4, 8, 12\); all four caches"),
    ("base", "k_state", lambda s: None, "got None, expected a cache, as angle_state is one; all four, or none"),
    ("base", "v_state", lambda s: s.int(), "got int32, expected float16"),
    ("no slots", "has_initial_state", lambda h: h.int(), "got int32, expected bool"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("write slots", "write_slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("base", "out", lambda o: o[..., :4], r"got shape \(3, 20, 4, 4\), expected \(3, 20, 4, 8\); out is like x"),
)


@mamba3_chunk_scan.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    slots, error = torch.tensor([0, 1, 2], device=device), "got a tensor, expected None where there are no caches"
    without = (("packed, no caches", name, lambda _: slots, error) for name in ("slots", "write_slots"))
    return [*_ERROR_INPUTS, *error_table(*without)]
