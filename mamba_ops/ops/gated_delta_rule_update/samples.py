"""Calls of gated_delta_rule_update: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.random_inputs import UPDATE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.gated_delta_rule_update.op import gated_delta_rule_update
from mamba_ops.registry import ErrorInput, Sample


@gated_delta_rule_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices

    def sample(name: str, *lead: int, k_heads: int = k_heads, raw: bool = True, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of one by default; q, k, v are parts of one tensor."""
        lead = lead or (3,)
        keys, values = k_heads * k_dim, v_heads * v_dim
        q, k, v = normal(*lead, 2 * keys + values).split([keys, keys, values], dim=-1)
        arguments = {
            "ssm_state": normal(9, v_heads, v_dim, k_dim, dtype=state_dtype),
            "q": q.unflatten(-1, (k_heads, k_dim)),
            "k": k.unflatten(-1, (k_heads, k_dim)),
            "v": v.unflatten(-1, (v_heads, v_dim)),
            "slots": indices(5, 1, 2),
            "qk_l2norm": True,
        }
        if raw:
            gate = {"a": normal(*lead, v_heads), "b": normal(*lead, v_heads)}
            weights = {n: normal(v_heads, dtype=torch.float32) for n in ("A_log", "dt_bias")}
            arguments |= {**gate, **weights}
        else:
            g, beta = -normal(*lead, v_heads, dtype=torch.float32).abs(), 2 * normal(*lead, v_heads).sigmoid()
            arguments |= {"g": g, "beta": beta}
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("ssm_state", "q", "k", "v")), arguments)

    packed: dict[str, Any] = {"cu_seqlens": indices(0, 2, 2, 5)}
    table = indices((1, 2, 3), (4, 5, 6), (-1, 7, 0), dtype=torch.int64)
    padded = normal(9, v_heads * v_dim * k_dim + 16, dtype=state_dtype)[:, 8:-8].view(9, v_heads, v_dim, k_dim)
    turned = normal(9, v_heads, k_dim, v_dim, dtype=state_dtype).transpose(2, 3)
    yield sample("base")
    yield sample("gates given", raw=False, slots=None, null_slot=0, k_heads=1, scale=0.3)
    zero = normal(3, k_heads, k_dim) * indices(0, 1, 1).view(3, 1, 1).to(dtype)
    yield sample("a few tokens, padded slots, a zero q", 3, 2, ssm_state=padded, q=zero[:, None].expand(-1, 2, -1, -1))
    short = {"raw": False, "beta": normal(3, v_heads).sigmoid(), "k": normal(3, k_heads, k_dim) / k_dim**0.5}
    yield sample("not normalised, turned state", ssm_state=turned, qk_l2norm=False, **short)
    moved: dict[str, Any] = {"slots": indices(-1, 0, 3), "write_slots": indices(6, 4, 7), "null_slot": 7}
    yield sample("null rows, write slots", **moved)
    v, out = (normal(v_heads, v_dim, 7, dtype=d).permute(2, 0, 1) for d in (dtype, torch.float32))
    yield sample("packed, empty row", 7, **packed, write_slots=indices(5, 7, 2), v=v, out=out)
    a = normal(6, v_heads) * 30
    speculative: dict[str, Any] = {"cu_seqlens": indices(0, 3, 5, 6), "num_accepted_tokens": indices(2, 1, 3)}
    yield sample("speculative", 6, a=a, b=-a, slots=table.abs(), null_slot=0, **speculative)
    written: dict[str, Any] = {"slots": table[:, :2], "write_slots": table.flip(1), "k_heads": v_heads}
    yield sample("speculative, write slots", 3, 2, num_accepted_tokens=indices(0, 2, 1), **written)


@gated_delta_rule_update.call_patterns(*UPDATE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, dim = random.lay_out(pattern), random.size("dim", 16)
    k_heads, heads = random.size("k_heads", 2), random.size("heads", 4)
    options = random.update_arguments(words) | {"A_log": random.weight(heads), "dt_bias": random.weight(heads)}
    options |= {"a": random.tokens(heads), "b": random.tokens(heads), "qk_l2norm": True}
    q, k, v = random.tokens(k_heads, dim), random.tokens(k_heads, dim), random.tokens(heads, dim)
    return Sample(pattern, (random.cache(heads, dim, dim), q, k, v), options)


_ERROR_INPUTS = error_table(
    ("base", "ssm_state", lambda s: s[0], r"got shape \(4, 24, 16\), expected \(slots, v_heads, v_dim, k_dim\)$"),
    ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16, bfloat16, float32 or float64; convert"),
    ("base", "ssm_state", lambda s: s[:, :3], r"v: got shape \(3, 4, 24\), expected \(3, 3, 24\); heads and v_dim"),
    ("base", "ssm_state", lambda s: s.mT, r"v: got shape \(3, 4, 24\), expected \(3, 4, 16\); heads and v_dim are"),
    ("gates given", "ssm_state", lambda s: s[:2], "got 2 slots, expected at least 3; without slots, row i uses slot i"),
    ("base", "v", lambda v: v[0], r"got shape \(4, 24\), expected \(n, v_heads, v_dim\) or \(n, length, v_heads, "),
    (
        "packed, empty row",
        "v",
        lambda v: v[None],
        r"got shape \(1, 7, 4, 24\), expected \(tokens, v_heads, v_dim\); with cu_seqlens, tokens are packed",
    ),
    ("base", "v", lambda v: v.bool(), "got bool, expected float16"),
    ("base", "q", lambda q: q[0], r"got shape \(2, 16\), expected \(..., k_heads, k_dim\), with the tokens of v"),
    ("base", "q", lambda q: q[:2], r"got shape \(2, 2, 16\), expected \(3, 2, 16\); tokens are those of v"),
    ("base", "q", lambda q: q[..., :8], r"got shape \(3, 2, 8\), expected \(3, 2, 16\)"),
    ("base", "q", lambda q: q.repeat(1, 2, 1)[:, :3], r"k: got shape \(3, 2, 16\), expected \(3, 3, 16\); k is like"),
    ("base", "q", lambda q: q.long(), "got int64, expected float16"),
    ("base", "k", lambda k: k[:, :1], r"got shape \(3, 1, 16\), expected \(3, 2, 16\); k is like q"),
    ("base", "k", lambda k: k.int(), "got int32, expected float16"),
    ("gates given", "g", lambda g: g[..., :2], r"got shape \(3, 2\), expected \(3, 4\); one number a token and"),
    ("gates given", "g", lambda g: g.int(), "got int32, expected float16"),
    ("gates given", "g", lambda g: None, "got none, expected a tensor: either g and beta, or a, b, A_log, dt_bias"),
    ("gates given", "beta", lambda b: b[:2], r"got shape \(2, 4\), expected \(3, 4\); one number a token"),
    ("gates given", "beta", lambda b: b.int(), "got int32, expected float16"),
    ("gates given", "beta", lambda b: None, "got none, expected a tensor: either g and beta, or a, b"),
    ("base", "a", lambda a: a[:2], r"got shape \(2, 4\), expected \(3, 4\); one number a token and head of v"),
    ("base", "a", lambda a: None, "got none, expected a tensor: either g and beta, or a, b, A_log, dt_bias are giv"),
    ("base", "b", lambda b: b[..., :1], r"got shape \(3, 1\), expected \(3, 4\); one number a token and head of v"),
    ("base", "b", lambda b: None, "got none, expected a tensor: either"),
    ("base", "A_log", lambda a: a[:2], r"got shape \(2,\), expected \(4,\); one number a head of v"),
    ("base", "A_log", lambda a: None, "got none, expected a tensor: either"),
    ("base", "dt_bias", lambda d: d[None], r"got shape \(1, 4\), expected \(4,\); one number a head of v"),
    ("base", "dt_bias", lambda d: None, "got none, expected a tensor: either"),
    ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64; convert it first"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3; give every row a slot"),
    ("base", "slots", lambda s: s.view(3, 1, 1), r"got shape \(3, 1, 1\), expected \(rows,\) or \(rows, colum"),
    ("speculative", "slots", lambda s: s[:, :0], "got 0 columns, expected at least 1; column 0 is the slot"),
    ("speculative", "slots", lambda s: None, "got none, expected a table; num_accepted_tokens picks its column"),
    ("null rows, write slots", "write_slots", lambda s: s[:1], "got 1 rows, expected at least 3; give"),
    ("null rows, write slots", "write_slots", lambda s: s.double(), "got float64, expected int32 or"),
    ("packed, empty row", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\); it"),
    ("packed, empty row", "cu_seqlens", lambda c: c.float(), "got float32, expected int32 or int64"),
    ("speculative", "num_accepted_tokens", lambda a: a[:1], r"got shape \(1,\), expected \(3,\);"),
    ("speculative", "num_accepted_tokens", lambda a: a.float(), "got float32, expected int32 or"),
    ("base", "out", lambda o: o[..., :1], r"got shape \(3, 4, 1\), expected \(3, 4, 24\); out is like v"),
    ("base", "out", lambda o: o.int(), "got int32, expected float16"),
)


@gated_delta_rule_update.error_inputs
def _error_inputs(device: torch.device) -> Iterator[ErrorInput]:
    yield from _ERROR_INPUTS
    yield ErrorInput(
        "base",
        "g",
        lambda _: torch.zeros(3, 4, device=device),
        "beta: got none, expected a tensor: either g and beta, or a, b",
    )
    yield ErrorInput(
        "gates given",
        "A_log",
        lambda _: torch.zeros(4, device=device),
        "A_log: got a tensor, expected none: either g and beta, or a",
    )
