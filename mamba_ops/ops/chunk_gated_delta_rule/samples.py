"""Calls of chunk_gated_delta_rule: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.random_inputs import SEQUENCE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.chunk_gated_delta_rule.op import chunk_gated_delta_rule
from mamba_ops.registry import ErrorInput, Sample


@chunk_gated_delta_rule.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
    length: int = 75,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each; rows have a chunk and a bit."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices
    tokens = 2 * length + 3

    def sample(name: str, *lead: int, k_heads: int = k_heads, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default; q, k, v are parts of one tensor."""
        lead = lead or (3, length)
        keys, values = k_heads * k_dim, v_heads * v_dim
        q, k, v = normal(*lead, 2 * keys + values).split([keys, keys, values], dim=-1)
        arguments = {
            "q": q.unflatten(-1, (k_heads, k_dim)),
            "k": k.unflatten(-1, (k_heads, k_dim)),
            "v": v.unflatten(-1, (v_heads, v_dim)),
            "g": -0.1 * normal(*lead, v_heads, dtype=torch.float32).abs(),  # the last token still knows the first
            "beta": normal(*lead, v_heads).sigmoid(),
            "ssm_state": normal(9, v_heads, v_dim, k_dim, dtype=state_dtype),
            "slots": indices(5, 1, 2),
            "qk_l2norm": True,
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("q", "k", "v", "g", "beta")), arguments)

    initial: dict[str, Any] = {"has_initial_state": indices(True, False, True, dtype=torch.bool)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    empty: dict[str, Any] = {
        "cu_seqlens": indices(0, length, length, length, tokens, dtype=torch.int64),
        "slots": indices(5, 1, 2, 6),
        "write_slots": indices(4, 1, 3, 0),
        "has_initial_state": indices(True, False, True, True, dtype=torch.bool),
    }
    padded = normal(9, v_heads * v_dim * k_dim + 16, dtype=state_dtype)[:, 8:-8].view(9, v_heads, v_dim, k_dim)
    turned = normal(9, v_heads, k_dim, v_dim, dtype=state_dtype).transpose(2, 3)
    doubled, strong = 2 * normal(1, length, v_heads).sigmoid(), -40 * normal(1, length, v_heads).abs()
    yield sample("base", **initial)
    short = {"qk_l2norm": False, "scale": 0.3, "k": normal(2, 9, k_heads, k_dim) / k_dim**0.5}
    yield Sample("no optionals", sample("bare", 2, 9).args, {"qk_l2norm": True})
    yield sample("not normalised, no slots", 2, 9, **short, slots=None, null_slot=0)
    yield sample("negative eigenvalues", 1, length, beta=doubled, k_heads=1, ssm_state=turned)
    yield sample("strong decay", 1, length, g=strong, k_heads=v_heads, ssm_state=padded)
    channel_major = normal(v_heads, v_dim, tokens).permute(2, 0, 1)
    moved: dict[str, Any] = {"write_slots": indices(7, -1, 0, 8), "null_slot": 7, "v": channel_major}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, **moved, **packed, **initial)
    yield sample("everything", tokens + 4, scale=0.3, write_slots=indices(4, 1, 3), **packed, **initial)
    out = normal(v_heads, v_dim, tokens + 4, dtype=torch.float32).permute(2, 0, 1)
    yield sample("packed, empty rows", tokens + 4, out=out, **empty)


@chunk_gated_delta_rule.call_patterns(*SEQUENCE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, dim = random.lay_out(pattern), random.size("dim", 16)
    k_heads, heads = random.size("k_heads", 2), random.size("heads", 4)
    options = random.sequence_arguments(words) | {"qk_l2norm": True}
    if "cached" in words:
        options["ssm_state"] = random.cache(heads, dim, dim)
    q, k, v = random.tokens(k_heads, dim), random.tokens(k_heads, dim), random.tokens(heads, dim)
    return Sample(pattern, (q, k, v, random.tokens(heads, dtype=torch.float32), random.tokens(heads)), options)


_ERROR_INPUTS = error_table(
    ("base", "v", lambda v: v[0], r"got shape \(75, 4, 24\), expected \(n, length, v_heads, v_dim\); packed tokens"),
    (
        "packed, null rows",
        "v",
        lambda v: v[None],
        r"got shape \(1, 153, 4, 24\), expected \(tokens, v_heads, v_dim\); with cu_seqlens",
    ),
    ("base", "v", lambda v: v.int(), "got int32, expected float16"),
    ("base", "v", lambda v: v[..., :0], r"got shape \(3, 75, 4, 0\), expected only tokens of size 0"),
    ("base", "q", lambda q: q[0], r"got shape \(75, 2, 16\), expected \(..., k_heads, k_dim\), with the tokens"),
    ("base", "q", lambda q: q[..., :0], r"got shape \(3, 75, 2, 0\), expected only tokens of size 0"),
    ("base", "q", lambda q: q.long(), "got int64, expected float16"),
    ("base", "q", lambda q: q[:2], r"got shape \(2, 75, 2, 16\), expected \(3, 75, 2, 16\); tokens are those of v"),
    ("base", "k", lambda k: k[..., :8], r"got shape \(3, 75, 2, 8\), expected \(3, 75, 2, 16\); k is like q"),
    ("base", "v", lambda v: v[:, :, :3], "q: got 2 heads, expected a divisor of the 3 heads of v"),
    ("base", "g", lambda g: g[..., :2], r"got shape \(3, 75, 2\), expected \(3, 75, 4\); one number a token"),
    ("base", "g", lambda g: g.int(), "got int32, expected float16"),
    ("base", "beta", lambda b: b[:, 1:], r"got shape \(3, 74, 4\), expected \(3, 75, 4\); one number a token"),
    ("packed, null rows", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("packed, null rows", "cu_seqlens", lambda c: c.float(), "got float32, expected int32 or int64"),
    ("base", "ssm_state", lambda s: s[0], r"got shape \(4, 24, 16\), expected \(4, 4, 24, 16\); \(slots, v_heads,"),
    ("base", "ssm_state", lambda s: s.mT, r"got shape \(9, 4, 16, 24\), expected \(9, 4, 24, 16\)"),
    ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16"),
    ("base", "ssm_state", lambda s: None, "got none, expected a cache; has_initial_state says which rows"),
    ("not normalised, no slots", "ssm_state", lambda s: s[:1], "got 1 slots, expected at least 2; without slots, row"),
    ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
    ("base", "slots", lambda s: s.view(3, 1, 1), r"got shape \(3, 1, 1\), expected \(rows,\) or"),
    ("packed, write slots", "write_slots", lambda s: s[:1], "got 1 rows, expected at least 3"),
    ("base", "has_initial_state", lambda h: h.int(), "got int32, expected bool"),
    ("base", "has_initial_state", lambda h: h[:2], r"got shape \(2,\), expected \(3,\)"),
    ("base", "out", lambda o: o[..., :1], r"got shape \(3, 75, 4, 1\), expected \(3, 75, 4, 24\); out is like v"),
    ("base", "out", lambda o: o.int(), "got int32, expected float16"),
)


@chunk_gated_delta_rule.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
