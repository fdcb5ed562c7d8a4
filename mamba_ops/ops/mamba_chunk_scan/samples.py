"""Calls of mamba_chunk_scan: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import most_chunks
from mamba_ops.ops._common.random_inputs import SEQUENCE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan
from mamba_ops.registry import ErrorInput, Sample


@mamba_chunk_scan.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    dim: int = 16,
    dstate: int = 16,
    groups: int = 2,
    chunk_size: int = 8,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; rows have two and a half chunks."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices
    length = 5 * chunk_size // 2
    tokens = 2 * length + 3

    def states(count: int, dtype: torch.dtype = state_dtype) -> Tensor:
        return normal(count, heads, dim, dstate, dtype=dtype)

    def sample(name: str, *lead: int, groups: int = groups, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default."""
        lead = lead or (3, length)
        arguments = {
            "x": normal(*lead, heads, dim),
            "dt": normal(*lead, heads),
            "A": -normal(heads, dtype=torch.float32).exp(),
            "B": normal(*lead, groups, dstate),
            "C": normal(*lead, groups, dstate),
            "chunk_size": chunk_size,
            "D": normal(heads, dtype=torch.float32),
            "dt_bias": normal(heads, dtype=torch.float32),
            "dt_softplus": True,
            "ssm_state": states(8),
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("x", "dt", "A", "B", "C", "chunk_size")), arguments)

    initial: dict[str, Any] = {"has_initial_state": indices(True, False, True, dtype=torch.bool)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    computed: dict[str, Any] = {"num_computed_tokens": indices(3, 2 * chunk_size, chunk_size - 1)}
    most = tokens // chunk_size + 6  # enough chunks for three packed rows

    yield sample("base")
    yield Sample("no optionals", sample("bare").args)
    yield sample("no softplus", dt_softplus=False)
    yield sample("dt above 20", dt=normal(3, length, heads) * 20, dt_bias=None)
    yield sample("dt limits", dt_min=0.25, dt_max=0.75)
    yield sample("D per channel", D=normal(heads, dim))
    yield sample("gate", z=normal(3, length, heads, dim))
    yield sample("one group", groups=1)
    yield sample("a group per head", groups=heads)
    yield sample("odd chunks", 1, length, slots=indices(5), chunk_size=3)
    yield sample("one long chunk", 2, 150, chunk_size=256, has_initial_state=initial["has_initial_state"][:2])
    yield sample("one token", 3, 1, **initial)
    yield sample("no rows", 0, length)
    yield sample("rows of no token", 3, 0, **initial)

    yield sample("initial states", **initial)
    yield sample("float16 states", ssm_state=states(8, torch.float16), **initial)
    padded = normal(8, heads * dim * dstate + 24, dtype=state_dtype)
    yield sample("padded slots", ssm_state=padded[:, 8:-16].view(8, heads, dim, dstate), **initial)
    transposed = normal(8, heads, dstate, dim, dtype=state_dtype).transpose(2, 3)
    yield sample("transposed state", ssm_state=transposed, **initial)
    yield sample("no slots", slots=None, null_slot=0, **initial)
    yield sample("slot table", slots=indices((5, 1), (0, 3), (7, 6), (2, 2), dtype=torch.int64), **initial)
    yield sample("write slots", write_slots=indices(4, 3, 7), **initial)
    yield sample("write slots alone", slots=None, write_slots=indices(4, 3, 7), **initial)
    yield sample("null rows", slots=indices(-1, 3, -7), **initial)
    yield sample("null slot 0", slots=indices(5, 0, 2), null_slot=0, **initial)
    yield sample("null destination", write_slots=indices(4, -1, 0), null_slot=0, **initial)

    yield sample("packed", tokens, **packed)
    yield sample("packed, initial states", tokens, **packed, **initial)
    yield sample("packed, empty rows", length, cu_seqlens=indices(0, 0, length, length, dtype=torch.int64))
    copied: dict[str, Any] = {"cu_seqlens": indices(0, length, length, length), "write_slots": indices(3, 4, 6)}
    yield sample("packed, empty rows, write slots", length, **copied, **initial)
    yield sample("packed, tokens past the end", tokens + 5, **packed, out=normal(tokens + 5, heads, dim))
    yield sample("absolute chunks", **computed, **initial)
    yield sample("absolute chunks, packed", tokens, **packed, **computed, **initial)
    yield sample("chunk states", chunk_states=states(3 * length // chunk_size + 3))
    changes: dict[str, Any] = {**packed, **computed, "slots": indices(5, -1, 2), "chunk_states": states(2 * most)[::2]}
    yield sample("chunk states, packed", tokens, **changes, **initial)
    begun: dict[str, Any] = {"num_computed_tokens": indices(3, 159), "has_initial_state": indices(True, False).bool()}
    yield sample("states of long chunks", 2, 150, chunk_size=80, slots=indices(5, 1), chunk_states=states(8), **begun)

    yield sample("float32 output", out=normal(3, length, heads, dim, dtype=torch.float32))
    other = torch.float16 if dtype != torch.float16 else torch.float32
    mixed: dict[str, Any] = {
        "B": normal(3, length, groups, dstate, dtype=other),
        "A": -normal(heads, dtype=other).abs(),
    }
    yield sample("mixed dtypes", **mixed, dt=normal(3, length, heads, dtype=other))
    strided: dict[str, Any] = {"z": normal(dim, length, heads, 3).permute(3, 1, 2, 0)}
    strided |= {"B": normal(dstate, groups, length, 3).permute(3, 2, 1, 0)}
    x, out = (normal(3, heads, dim, length, dtype=d).permute(0, 3, 1, 2) for d in (dtype, torch.float32))
    yield sample("transposed activations", **strided, x=x, out=out)
    sizes = [heads * dim, groups * dstate, groups * dstate, heads]
    x, B, C, dt = normal(tokens, sum(sizes)).split(sizes, dim=1)
    views: dict[str, Any] = {"x": x.unflatten(1, (heads, dim)), "B": B.unflatten(1, (groups, dstate)), "dt": dt}
    yield sample("views of a projection", tokens, **packed, **views, C=C.unflatten(1, (groups, dstate)))
    yield sample(
        "everything",
        tokens + 5,
        **packed,
        **computed,
        **initial,
        D=normal(heads, dim),
        z=normal(tokens + 5, heads, dim),
        dt_min=0.1,
        dt_max=2.0,
        slots=indices((5, 1), (0, 3), (7, 6)),
        write_slots=indices((2, 4), (3, 0), (0, -1)),
        null_slot=0,
        chunk_states=states(most + 2),
        out=normal(tokens + 5, heads, dim),
    )


@mamba_chunk_scan.call_patterns(*SEQUENCE_PATTERNS, "rows cached chunk-states")
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, heads, dim = random.lay_out(pattern), random.size("heads", 4), random.size("dim", 16)
    dstate, groups, chunk_size = random.size("dstate", 16), random.size("groups", 2), random.size("chunk_size", 32)
    options = random.sequence_arguments(words)
    options |= {"D": random.weight(heads), "dt_bias": random.weight(heads), "dt_softplus": True}
    if "cached" in words:
        computed = random.row_values(1, torch.int32)
        options |= {"ssm_state": random.cache(heads, dim, dstate), "num_computed_tokens": computed}
    x, dt = random.tokens(heads, dim), random.tokens(heads)
    if "chunk-states" in words:
        chunks = most_chunks(dt.numel() // heads, random.rows, chunk_size, options["num_computed_tokens"])
        options["chunk_states"] = random.placed((chunks + 1, heads, dim, dstate), random.state_dtype)
    B, C = random.tokens(groups, dstate), random.tokens(groups, dstate)
    return Sample(pattern, (x, dt, random.weight(heads), B, C, chunk_size), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(20, 4, 16\), expected \(n, length, heads, dim\); packed tokens come"),
    ("packed", "x", lambda x: x[None], r"got shape \(1, 43, 4, 16\), expected \(tokens, heads, dim\); with cu_seqlens"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16"),
    ("base", "x", lambda x: x[..., :0], r"got shape \(3, 20, 4, 0\), expected only tokens of size 0"),
    ("base", "dt", lambda d: d[..., :2], r"got shape \(3, 20, 2\), expected \(3, 20, 4\); one step size"),
    ("base", "A", lambda a: a[:3], r"got shape \(3,\), expected \(4,\)"),
    ("base", "A", lambda a: a.long(), "got int64, expected float16"),
    ("base", "B", lambda b: b[0], r"got shape \(20, 2, 16\), expected like x"),
    ("base", "B", lambda b: b[:, :9], r"got shape \(3, 9, 2, 16\), expected \(3, 20, 2, 16\); tokens are those of x"),
    ("base", "C", lambda c: c[..., :8], r"got shape \(3, 20, 2, 8\), expected \(3, 20, 2, 16\); C is like B"),
    ("base", "chunk_size", lambda _: 0, "got 0, expected 1 to 4096 tokens"),
    ("dt limits", "dt_max", lambda _: 0.125, "dt_min: got 0.25, expected at most dt_max, which is 0.125"),
    ("base", "D", lambda d: d[:2], r"got shape \(2,\), expected \(4,\) or \(4, 16\)"),
    ("gate", "z", lambda z: z[:1], r"got shape \(1, 20, 4, 16\), expected \(3, 20, 4, 16\); z is like x"),
    ("base", "dt_bias", lambda d: d[:2], r"got shape \(2,\), expected \(4,\)"),
    ("packed", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("absolute chunks", "num_computed_tokens", lambda c: c[:2], r"got shape \(2,\), expected \(3,\)"),
    ("absolute chunks", "num_computed_tokens", lambda c: c.bool(), "got bool, expected int32 or int64"),
    ("base", "ssm_state", lambda s: s[0], r"got shape \(4, 16, 16\), expected \(4, 4, 16, 16\); \(slots, heads"),
    ("base", "ssm_state", lambda s: s[:, :3], r"got shape \(8, 3, 16, 16\), expected \(8, 4, 16, 16\)"),
    ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16"),
    ("no slots", "ssm_state", lambda s: s[:2], "got 2 slots, expected at least 3; without slots, row i uses"),
    ("initial states", "ssm_state", lambda s: None, "got none, expected a cache; has_initial_state"),
    ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("write slots", "write_slots", lambda s: s[:1], "got 1 rows, expected at least 3"),
    ("initial states", "has_initial_state", lambda h: h.int(), "got int32, expected bool"),
    ("initial states", "has_initial_state", lambda h: h[:2], r"got shape \(2,\), expected \(3,\)"),
    ("chunk states", "chunk_states", lambda c: c[:9], "got 9 chunks, expected at least 10; as many"),
    ("chunk states", "chunk_states", lambda c: c[:, 1:], r"got shape \(10, 3, 16, 16\), expected \(10, 4"),
    ("base", "out", lambda o: o[..., :1], r"got shape \(3, 20, 4, 1\), expected \(3, 20, 4, 16\); out is like x"),
)


@mamba_chunk_scan.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
