"""Calls of selective_state_update: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.random_inputs import UPDATE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.selective_state_update.op import selective_state_update
from mamba_ops.registry import ErrorInput, Sample


@selective_state_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    dim: int = 16,
    dstate: int = 16,
    groups: int = 2,
) -> Iterator[Sample]:
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices

    def sample(name: str, *lead: int, heads: int = heads, groups: int = groups, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three by default; heads = 0 is Mamba-1."""
        lead = lead or (3,)
        if heads:
            channels, per_head, group, a = [heads, dim], [heads], [groups], [heads]
        else:
            channels, per_head, group, a = inner, inner, [], [*inner, dstate]
        arguments = {
            "ssm_state": normal(8, *channels, dstate, dtype=state_dtype),
            "x": normal(*lead, *channels),
            "dt": normal(*lead, *per_head),
            "A": -normal(*a, dtype=torch.float32).exp(),
            "B": normal(*lead, *group, dstate),
            "C": normal(*lead, *group, dstate),
            "D": normal(*per_head, dtype=torch.float32),
            "dt_bias": normal(*per_head, dtype=torch.float32),
            "dt_softplus": True,
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("ssm_state", "x", "dt", "A", "B", "C")), arguments)

    channels = (heads, dim)
    inner = [heads * dim]  # the channels of Mamba-1
    per_channel: dict[str, Any] = {name: normal(*channels, dtype=torch.float32) for name in ("D", "dt_bias")}
    full_A = -normal(*channels, dstate, dtype=torch.float32).exp()
    columns = indices((5, 1, 2), (0, 3, 4), (7, 6, -1))

    yield sample("base")
    bare = sample("bare")
    yield Sample("no optionals", (*bare.args[:2], bare.args[2].abs(), *bare.args[3:]))
    positive: dict[str, Any] = {"dt": normal(3, heads).abs(), "dt_bias": normal(heads).abs()}
    yield sample("no softplus", **positive, dt_softplus=False)
    yield sample("dt above 20", dt=normal(3, heads) * 20)
    yield sample("per-channel dt", dt=normal(3, *channels))
    yield sample("per-channel D and bias", **per_channel)
    yield sample("full A", A=full_A)
    yield sample("nothing tied", A=full_A, dt=normal(3, *channels), **per_channel)
    yield sample("gate", z=normal(3, *channels))
    yield sample("one group", groups=1)
    yield sample("mamba1", heads=0)
    yield sample("mamba1 gate", heads=0, z=normal(3, *inner))
    yield sample("one head", heads=1, groups=1)

    yield sample("float16 state", ssm_state=normal(8, *channels, dstate, dtype=torch.float16))
    yield sample("bfloat16 state", ssm_state=normal(8, *channels, dstate, dtype=torch.bfloat16))
    yield sample("float32 output", out=normal(*channels, 3, dtype=torch.float32).permute(2, 0, 1))
    padded = normal(8, heads * dim * dstate + 24, dtype=state_dtype)
    yield sample("padded slots", ssm_state=padded[:, 8:-16].view(8, *channels, dstate))
    yield sample("transposed state", ssm_state=normal(8, heads, dstate, dim, dtype=state_dtype).transpose(2, 3))
    yield sample("transposed x", x=normal(heads, dim, 3).permute(2, 0, 1), out=normal(dim, heads, 3).transpose(0, 2))
    x, B, C = normal(3, heads * dim + 2 * groups * dstate).split([heads * dim, groups * dstate, groups * dstate], dim=1)
    B, C = B.unflatten(1, (groups, dstate)), C.unflatten(1, (groups, dstate))
    yield sample("views of a projection", x=x.unflatten(1, channels), B=B, C=C)

    yield sample("slot table", slots=columns, null_slot=-1)
    yield sample("int64 slots, more than rows", slots=indices(6, 3, 0, 1, 2, dtype=torch.int64))
    yield sample("no slots", slots=None, null_slot=0)
    yield sample("write slots", write_slots=indices(4, 1, 7))
    yield sample("write slots alone", slots=None, write_slots=indices(4, 1, 7))
    yield sample("null rows", slots=indices(-1, 3, -1))
    yield sample("null slot 0", slots=indices(5, 0, -7), null_slot=0)
    yield sample("all rows null", slots=indices(-1, -1, -1))
    yield sample("null destination", write_slots=indices(4, -1, 0), null_slot=0)

    yield sample("rows of two tokens", 3, 2, z=normal(3, 2, *channels))
    by_token: dict[str, Any] = {name: normal(2, 3, *channels).transpose(0, 1) for name in ("x", "z", "out")}
    yield sample("rows of two tokens, by token", 3, 2, **by_token)
    yield sample("packed", 7, cu_seqlens=indices(0, 2, 3, 7))
    yield sample("packed, empty and null rows", 5, cu_seqlens=indices(0, 0, 3, 3, 5), slots=indices(0, -1, 2, 4))
    yield sample("packed, tokens past the end", 7, cu_seqlens=indices(0, 1, 3, 4), out=normal(7, *channels))
    yield sample("packed mamba1", 7, heads=0, cu_seqlens=indices(0, 2, 3, 7, dtype=torch.int64))

    accepted: dict[str, Any] = {"num_accepted_tokens": indices(2, 0, 3), "slots": columns}
    yield sample("speculative", **accepted)
    yield sample("speculative rows", 3, 3, **accepted)
    yield sample("speculative packed", 6, cu_seqlens=indices(0, 3, 4, 6), **accepted)
    yield sample("speculative, more tokens than columns", 6, cu_seqlens=indices(0, 1, 1, 6), **accepted)
    half = normal(8, *channels, dstate, dtype=torch.float16)
    seed: dict[str, Any] = {"ssm_state": half, "rounding_seed": indices(0x123456789ABCDEF, dtype=torch.int64)}
    yield sample("stochastic rounding", **seed)
    rounded: dict[str, Any] = {**seed, **accepted, "rounding_seed": indices(-5, dtype=torch.int64)[0]}
    yield sample("stochastic rounding, speculative rows", 3, 3, **rounded, philox_rounds=7)
    whole = (normal(8, *channels, dstate) * 9000).to(torch.int16)
    narrow: dict[str, Any] = {"ssm_state": whole, "state_scale": 1e-4 * normal(8, *channels, dtype=torch.float32).abs()}
    yield sample("int16 state", **narrow)
    yield sample("int16 state, rows in order", **narrow, slots=None)
    pages = normal(8, heads, dim + 5, dtype=torch.float32)[..., 2:-3].abs() * 1e-4
    turned = (normal(8, heads, dstate, dim) * 9000).to(torch.int16).transpose(2, 3)
    far: dict[str, Any] = {"ssm_state": turned, "state_scale": pages, "write_slots": indices(4, -1, 0), "null_slot": 0}
    yield sample("int16 state, padded scales, null destinations", **far)
    seeded: dict[str, Any] = {**narrow, **accepted, "rounding_seed": seed["rounding_seed"]}
    yield sample("int16 state, stochastic rounding, speculative rows", 3, 3, **seeded)
    of_mamba1: dict[str, Any] = {n: t.flatten(1, 2) for n, t in narrow.items()}
    yield sample("int16 state, packed mamba1", 7, heads=0, cu_seqlens=indices(0, 2, 3, 7), **of_mamba1)
    yield sample("no rows", 0, slots=None)
    yield sample("one row", 1)
    yield sample(
        "everything",
        7,
        A=full_A,
        dt=normal(7, *channels),
        **per_channel,
        z=normal(7, *channels),
        slots=indices((5, 1), (0, 3), (7, 6)),
        write_slots=indices((2, 4, 1), (3, 0, 0), (7, -1, 0)),
        cu_seqlens=indices(0, 2, 3, 6),
        num_accepted_tokens=indices(2, 0, 2, dtype=torch.int64),
        null_slot=0,
        out=normal(7, *channels),
    )


@selective_state_update.call_patterns(*UPDATE_PATTERNS, "one token mamba1")
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, dstate = random.lay_out(pattern), random.size("dstate", 16)
    heads, dim, groups = random.size("heads", 4), random.size("dim", 16), random.size("groups", 2)
    inner, group, a = ((heads, dim), (groups,), (heads,)) if "mamba1" not in words else ((dim,), (), (dim, dstate))
    options = random.update_arguments(words)
    options |= {"D": random.weight(inner[0]), "dt_bias": random.weight(inner[0]), "dt_softplus": True}
    x, dt = random.tokens(*inner), random.tokens(inner[0])
    B, C = random.tokens(*group, dstate), random.tokens(*group, dstate)
    return Sample(pattern, (random.cache(*inner, dstate), x, dt, random.weight(*a), B, C), options)


_ERROR_INPUTS = error_table(
    ("base", "ssm_state", lambda s: s[0, 0], r"got shape \(16, 16\), expected \(slots, dim, dstate\) or"),
    ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16"),
    ("base", "ssm_state", lambda s: s[:, :3], r"x: got shape"),
    ("no slots", "ssm_state", lambda s: s[:1], "got 1 slots, expected at least"),
    ("base", "x", lambda x: x[0], r"got shape \(4, 16\), expected"),
    ("base", "x", lambda x: x.bool(), "got bool, expected float16"),
    ("base", "dt", lambda d: d[:, :2], "got shape"),
    ("base", "dt", lambda d: d.long(), "got int64"),
    ("base", "A", lambda a: a[:3], r"got shape \(3,\), expected \(4, 16, 16\) or \(4,\)"),
    ("base", "B", lambda b: b[..., :8], "got shape"),
    ("one group", "B", lambda b: b.repeat(1, 3, 1), r"C: got shape \(3, 1, 16\), expected \(3, 3, 16\); C is like B"),
    ("base", "C", lambda c: c[:1], "got shape"),
    ("base", "D", lambda d: d[:2], r"got shape \(2,\), expected \(4, 16\) or \(4,\)"),
    ("base", "dt_bias", lambda d: d[:2], r"got shape \(2,\), expected \(4, 16\) or \(4,\)"),
    ("gate", "z", lambda z: z[:1], "got shape"),
    ("base", "slots", lambda s: s.double(), "got float64, expected int32 or int64"),
    ("base", "slots", lambda s: s[:1], "got 1 rows, expected at least"),
    ("write slots", "write_slots", lambda s: s[:1], "got 1 rows, expected at least"),
    ("packed", "cu_seqlens", lambda c: c[None], r"got shape .* expected \(n \+ 1,\)"),
    ("speculative", "num_accepted_tokens", lambda a: a[:1], r"got shape \(1,\)"),
    ("speculative", "slots", lambda s: None, "got None"),
    ("base", "out", lambda o: o[..., :1], "got shape"),
    ("base", "philox_rounds", lambda _: -7, "got -7, expected 1 to 100, or 0 for 10"),
    ("base", "philox_rounds", lambda _: 10**9, "got 1000000000, expected 1 to 100, or 0 for 10"),
    ("stochastic rounding", "rounding_seed", lambda s: s.repeat(2), r"got shape \(2,\), expected \(1,\) or"),
    ("stochastic rounding", "ssm_state", lambda s: s.bfloat16(), "got bfloat16, expected float16, int16 or float8_e4"),
    ("int16 state", "ssm_state", lambda s: s.float(), "got float32, expected int16 or float8_e4m3fn; state_scale is"),
    ("int16 state", "state_scale", lambda s: None, r"got none for a state of int16, expected float32 \(slots, heads,"),
    ("int16 state", "state_scale", lambda s: s.double(), "got float64, expected float32; mamba_ops.functional.narrow_"),
    ("int16 state", "state_scale", lambda s: s[..., :-1], r"got shape \(8, 4, 15\), expected \(8, 4, 16\); \(slots, h"),
    ("int16 state", "state_scale", lambda s: s[:-1], r"got shape \(7, 4, 16\), expected \(8, 4, 16\); \(slots, heads"),
)


@selective_state_update.error_inputs
def _error_inputs(device: torch.device) -> Iterator[ErrorInput]:
    yield from _ERROR_INPUTS
    yield ErrorInput(
        "base",
        "rounding_seed",
        lambda _: torch.zeros(1, dtype=torch.int32, device=device),
        "rounding_seed: got int32, expected int64",
    )
