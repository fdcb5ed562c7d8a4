"""Calls of the gated delta rules, whatever decays what: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.registry import ErrorInput, Sample

SIZES = {"k_heads": 2, "v_heads": 4, "k_dim": 16, "v_dim": 24}


def prefill_samples(
    make: SampleTensors, state_dtype: torch.dtype, sizes: dict[str, int], length: int, *, by_channel: bool
) -> Iterator[Sample]:
    """Yield the base call that reads sequences, then calls that change a few things each.

    Rows have a chunk and a bit.

    Args:
        make: makes their tensors.
        state_dtype: of caches.
        sizes: heads, and their sizes.
        length: tokens of a row.
        by_channel: whether g has a number for each channel of a key.
    """
    normal, indices = make.normal, make.indices
    k_heads, v_heads, k_dim, v_dim = (sizes[name] for name in SIZES)
    gate = (k_dim,) if by_channel else ()
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
            # the last token still knows the first
            "g": -0.1 * normal(*lead, v_heads, *gate, dtype=torch.float32).abs(),
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
    doubled, strong = 2 * normal(1, length, v_heads).sigmoid(), -40 * normal(1, length, v_heads, *gate).abs()
    yield sample("base", **initial)
    short = {"qk_l2norm": False, "scale": 0.3, "k": normal(2, 9, k_heads, k_dim) / k_dim**0.5}
    yield Sample("no optionals", sample("bare", 2, 9).args, {"qk_l2norm": True})
    yield sample("not normalised, no slots", 2, 9, **short, slots=None, null_slot=0)
    between = {"g": -2 * normal(1, length, v_heads, *gate).abs()} if by_channel else {}
    yield sample("negative eigenvalues", 1, length, beta=doubled, k_heads=1, ssm_state=turned, **between)
    yield sample("strong decay", 1, length, g=strong, k_heads=v_heads, ssm_state=padded)
    channel_major = normal(v_heads, v_dim, tokens).permute(2, 0, 1)
    moved: dict[str, Any] = {"write_slots": indices(7, -1, 0, 8), "null_slot": 7, "v": channel_major}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, **moved, **packed, **initial)
    yield sample("everything", tokens + 4, scale=0.3, write_slots=indices(4, 1, 3), **packed, **initial)
    out = normal(v_heads, v_dim, tokens + 4, dtype=torch.float32).permute(2, 0, 1)
    yield sample("packed, empty rows", tokens + 4, out=out, **empty)


def prefill_call(random: RandomInputs, pattern: str, *, by_channel: bool) -> Sample:
    """Return the call of a pattern that reads sequences."""
    words, dim = random.lay_out(pattern), random.size("dim", 16)
    k_heads, heads = random.size("k_heads", 2), random.size("heads", 4)
    options = random.sequence_arguments(words) | {"qk_l2norm": True}
    if "cached" in words:
        options["ssm_state"] = random.cache(heads, dim, dim)
    q, k, v = random.tokens(k_heads, dim), random.tokens(k_heads, dim), random.tokens(heads, dim)
    g = random.tokens(heads, *((dim,) if by_channel else ()), dtype=torch.float32)
    return Sample(pattern, (q, k, v, g, random.tokens(heads)), options)


def prefill_errors(*, by_channel: bool) -> list[ErrorInput]:
    """Return wrong calls that read sequences, by the sizes of the samples."""
    of_g = r"\(3, 75, 4, 16\); one number a token, head" if by_channel else r"\(3, 75, 4\); one number a token and"
    one_head = r"\(3, 75, 4, 2\)" if by_channel else r"\(3, 75, 2\)"
    return error_table(
        (
            "base",
            "v",
            lambda v: v[0],
            r"got shape \(75, 4, 24\), expected \(n, length, v_heads, v_dim\); packed tokens",
        ),
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
        ("base", "g", lambda g: g[..., :2], rf"got shape {one_head}, expected {of_g}"),
        ("base", "g", lambda g: g.int(), "got int32, expected float16"),
        ("base", "beta", lambda b: b[:, 1:], r"got shape \(3, 74, 4\), expected \(3, 75, 4\); one number a token"),
        ("packed, null rows", "cu_seqlens", lambda c: c[None], r"got shape \(1, 4\), expected \(n \+ 1,\)"),
        ("packed, null rows", "cu_seqlens", lambda c: c.float(), "got float32, expected int32 or int64"),
        ("base", "ssm_state", lambda s: s[0], r"got shape \(4, 24, 16\), expected \(4, 4, 24, 16\); \(slots, v_heads,"),
        ("base", "ssm_state", lambda s: s.mT, r"got shape \(9, 4, 16, 24\), expected \(9, 4, 24, 16\)"),
        ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16"),
        ("base", "ssm_state", lambda s: None, "got none, expected a cache; has_initial_state says which rows"),
        (
            "not normalised, no slots",
            "ssm_state",
            lambda s: s[:1],
            "got 1 slots, expected at least 2; without slots, row",
        ),
        ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64"),
        ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3"),
        ("base", "slots", lambda s: s.view(3, 1, 1), r"got shape \(3, 1, 1\), expected \(rows,\) or"),
        ("packed, write slots", "write_slots", lambda s: s[:1], "got 1 rows, expected at least 3"),
        ("base", "has_initial_state", lambda h: h.int(), "got int32, expected bool"),
        ("base", "has_initial_state", lambda h: h[:2], r"got shape \(2,\), expected \(3,\)"),
        ("base", "out", lambda o: o[..., :1], r"got shape \(3, 75, 4, 1\), expected \(3, 75, 4, 24\); out is like v"),
        ("base", "out", lambda o: o.int(), "got int32, expected float16"),
    )


def update_samples(
    make: SampleTensors, state_dtype: torch.dtype, sizes: dict[str, int], *, by_channel: bool
) -> Iterator[Sample]:
    """Yield the base call that advances states, then calls that change a few things each; see `prefill_samples`."""
    normal, indices, dtype = make.normal, make.indices, make.dtype
    k_heads, v_heads, k_dim, v_dim = (sizes[name] for name in SIZES)
    gate = (k_dim,) if by_channel else ()

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
            arguments |= {"a": normal(*lead, v_heads, *gate), "b": normal(*lead, v_heads)}
            arguments |= {
                "A_log": normal(v_heads, dtype=torch.float32),
                "dt_bias": normal(v_heads, *gate, dtype=torch.float32),
            }
        else:
            g = -normal(*lead, v_heads, *gate, dtype=torch.float32).abs()
            arguments |= {"g": g, "beta": 2 * normal(*lead, v_heads).sigmoid()}
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
    a = normal(6, v_heads, *gate) * 30
    b = -a[..., 0] if by_channel else -a
    speculative: dict[str, Any] = {"cu_seqlens": indices(0, 3, 5, 6), "num_accepted_tokens": indices(2, 1, 3)}
    yield sample("speculative", 6, a=a, b=b, slots=table.abs(), null_slot=0, **speculative)
    written: dict[str, Any] = {"slots": table[:, :2], "write_slots": table.flip(1), "k_heads": v_heads}
    yield sample("speculative, write slots", 3, 2, num_accepted_tokens=indices(0, 2, 1), **written)
    half = normal(9, v_heads, v_dim, k_dim, dtype=torch.float16)
    seed = indices(0x123456789ABCDEF, dtype=torch.int64)
    yield sample("stochastic rounding", ssm_state=half, rounding_seed=seed)
    whole = (normal(9, v_heads, v_dim, k_dim) * 9000).to(torch.int16)
    narrow: dict[str, Any] = {
        "ssm_state": whole,
        "state_scale": 1e-4 * normal(9, v_heads, v_dim, dtype=torch.float32).abs(),
    }
    yield sample("int16 state", **narrow)
    yield sample("int16 state, rows in order", **narrow, slots=None)
    far = (normal(9, v_heads, k_dim, v_dim) * 9000).to(torch.int16).transpose(2, 3)
    pages = 1e-4 * normal(9, v_heads, v_dim + 5, dtype=torch.float32)[..., 2:-3].abs()
    yield sample("int16 state, padded scales, null rows, write slots", ssm_state=far, state_scale=pages, **moved)
    written |= {**narrow, "rounding_seed": seed[0], "philox_rounds": 7, "num_accepted_tokens": indices(0, 2, 1)}
    yield sample("int16 state, stochastic rounding, speculative", 3, 2, **written)


def update_call(random: RandomInputs, pattern: str, *, by_channel: bool) -> Sample:
    """Return the call of a pattern that advances states."""
    words, dim = random.lay_out(pattern), random.size("dim", 16)
    k_heads, heads = random.size("k_heads", 2), random.size("heads", 4)
    gate = (heads, dim) if by_channel else (heads,)
    options = random.update_arguments(words) | {"A_log": random.weight(heads), "dt_bias": random.weight(*gate)}
    options |= {"a": random.tokens(*gate), "b": random.tokens(heads), "qk_l2norm": True}
    q, k, v = random.tokens(k_heads, dim), random.tokens(k_heads, dim), random.tokens(heads, dim)
    return Sample(pattern, (random.cache(heads, dim, dim), q, k, v), options)


def update_errors(device: torch.device, *, by_channel: bool) -> list[ErrorInput]:
    """Return wrong calls that advance states, by the sizes of the samples."""
    whole, number = (r"\(3, 4, 16\)", "one number a token, head of v") if by_channel else (r"\(3, 4\)", "one number a")
    one_head = r"\(3, 4, 2\)" if by_channel else r"\(3, 2\)"
    bias, biases = (r"\(1, 4, 16\)", r"\(4, 16\)") if by_channel else (r"\(1, 4\)", r"\(4,\)")
    table = error_table(
        ("base", "ssm_state", lambda s: s[0], r"got shape \(4, 24, 16\), expected \(slots, v_heads, v_dim, k_dim\)$"),
        ("base", "ssm_state", lambda s: s.int(), "got int32, expected float16, bfloat16, float32 or float64; convert"),
        ("base", "ssm_state", lambda s: s[:, :3], r"v: got shape \(3, 4, 24\), expected \(3, 3, 24\); heads and v_dim"),
        ("base", "ssm_state", lambda s: s.mT, r"v: got shape \(3, 4, 24\), expected \(3, 4, 16\); heads and v_dim are"),
        (
            "gates given",
            "ssm_state",
            lambda s: s[:2],
            "got 2 slots, expected at least 3; without slots, row i uses slot i",
        ),
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
        ("base", "q", lambda q: q.repeat(1, 2, 1)[:, :3], r"k: got shape \(3, 2, 16\), expected \(3, 3, 16\); k is"),
        ("base", "q", lambda q: q.long(), "got int64, expected float16"),
        ("base", "k", lambda k: k[:, :1], r"got shape \(3, 1, 16\), expected \(3, 2, 16\); k is like q"),
        ("base", "k", lambda k: k.int(), "got int32, expected float16"),
        ("gates given", "g", lambda g: g[..., :2], rf"got shape {one_head}, expected {whole}; {number}"),
        ("gates given", "g", lambda g: g.int(), "got int32, expected float16"),
        ("gates given", "g", lambda g: None, "got none, expected a tensor: either g and beta, or a, b, A_log, dt_bias"),
        ("gates given", "beta", lambda b: b[:2], r"got shape \(2, 4\), expected \(3, 4\); one number a token"),
        ("gates given", "beta", lambda b: b.int(), "got int32, expected float16"),
        ("gates given", "beta", lambda b: None, "got none, expected a tensor: either g and beta, or a, b"),
        ("base", "a", lambda a: a[..., :2], rf"got shape {one_head}, expected {whole}; {number}"),
        (
            "base",
            "a",
            lambda a: None,
            "got none, expected a tensor: either g and beta, or a, b, A_log, dt_bias are giv",
        ),
        ("base", "b", lambda b: b[..., :1], r"got shape \(3, 1\), expected \(3, 4\); one number a token and head of v"),
        ("base", "b", lambda b: None, "got none, expected a tensor: either"),
        ("base", "A_log", lambda a: a[:2], r"got shape \(2,\), expected \(4,\); one number a head of v"),
        ("base", "A_log", lambda a: None, "got none, expected a tensor: either"),
        ("base", "dt_bias", lambda d: d[None], rf"got shape {bias}, expected {biases}; one number a head of v"),
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
        ("base", "philox_rounds", lambda _: -7, "got -7, expected 1 to 100, or 0 for 10"),
        ("base", "philox_rounds", lambda _: 10**9, "got 1000000000, expected 1 to 100, or 0 for 10"),
        ("stochastic rounding", "rounding_seed", lambda s: s.repeat(2), r"got shape \(2,\), expected \(1,\) or"),
        ("stochastic rounding", "rounding_seed", lambda s: s.int(), "got int32, expected int64"),
        (
            "stochastic rounding",
            "ssm_state",
            lambda s: s.bfloat16(),
            "got bfloat16, expected float16, int16 or float",
        ),
        ("int16 state", "ssm_state", lambda s: s.float(), "got float32, expected int16 or float8_e4m3fn; state_scale"),
        ("int16 state", "state_scale", lambda s: None, r"got none for a state of int16, expected float32 \(slots, v_h"),
        ("int16 state", "state_scale", lambda s: s.double(), "got float64, expected float32; mamba_ops.functional.na"),
        (
            "int16 state",
            "state_scale",
            lambda s: s[..., :-1],
            r"got shape \(9, 4, 23\), expected \(9, 4, 24\)",
        ),
    )
    g = torch.zeros(3, 4, *((16,) if by_channel else ()), device=device)
    table.append(ErrorInput("base", "g", lambda _: g, "beta: got none, expected a tensor: either g and beta, or a, b"))
    a_log = torch.zeros(4, device=device)
    message = "A_log: got a tensor, expected none: either g and beta, or a"
    return [*table, ErrorInput("gates given", "A_log", lambda _: a_log, message)]
