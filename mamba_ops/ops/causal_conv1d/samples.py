"""Calls of causal_conv1d: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.random_inputs import SEQUENCE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.causal_conv1d.op import causal_conv1d
from mamba_ops.registry import ErrorInput, Sample


@causal_conv1d.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.bfloat16,
    dim: int = 24,
    width: int = 4,
    length: int = 6,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; `length` is that of dense sequences."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices

    def cache(*, width: int = width, extra: int = 0, unused: int = 0, dtype: torch.dtype = state_dtype) -> Tensor:
        """Six slots, `dim` contiguous, with `extra` columns beyond width - 1 and `unused` ones between the slots."""
        return normal(6, width - 1 + extra + unused, dim, dtype=dtype)[:, unused:].transpose(1, 2)

    x, weight, bias, slots = normal(3, length, dim), normal(dim, width), normal(dim), indices(5, 0, 3)
    known = indices(True, False, True, dtype=torch.bool)

    def base(**changes: Any) -> dict[str, Any]:
        return {"bias": bias, "conv_state": cache(), "slots": slots, "has_initial_state": known, **changes}

    yield Sample("base", (x, weight), base())
    yield Sample("no optional", (x, weight), {})
    yield Sample("no bias", (x, weight), base(bias=None))
    yield Sample("no cache", (x, weight), {"bias": bias})
    yield Sample("no slots", (x, weight), base(slots=None))
    yield Sample("no initial states", (x, weight), base(has_initial_state=None))
    yield Sample("no silu", (x, weight), base(silu=False))
    for other in (2, 8):
        yield Sample(f"width {other}", (x, normal(dim, other)), base(conv_state=cache(width=other)))
    yield Sample("one sequence", (x[:1], weight), base(has_initial_state=known[:1]))
    yield Sample("no sequences", (x[:0], weight), base(has_initial_state=known[:0]))
    yield Sample("one token each", (x[:, :1], weight), base())
    yield Sample("no tokens", (x[:, :0], weight), base())
    yield Sample("many tokens", (normal(3, 8 * length, dim), weight), base())
    for other_dtype in (torch.float16, torch.float32):
        changes = {"bias": bias.to(other_dtype), "conv_state": cache(dtype=other_dtype)}
        yield Sample(short(other_dtype), (x.to(other_dtype), weight.to(other_dtype)), base(**changes))
    mixed = base(conv_state=cache(dtype=torch.float16), out=normal(3, length, dim, dtype=torch.float32))
    yield Sample("mixed dtypes", (x, weight.float()), mixed)

    yield Sample("columns contiguous", (x, weight), base(conv_state=cache().contiguous()))
    yield Sample("padded slots", (x, weight), base(conv_state=cache(unused=2)))
    yield Sample("more columns", (x, weight), base(conv_state=cache(extra=2)))
    yield Sample("sliced x", (normal(3, length, 2 * dim)[..., dim:], weight), base())
    transposed = base(out=normal(3, dim, length).transpose(1, 2))
    yield Sample("transposed x", (normal(3, dim, length).transpose(1, 2), weight), transposed)
    strided = base(bias=normal(2 * dim)[::2], slots=torch.stack((slots, slots), 1)[:, 0])
    yield Sample("strided weights and slots", (x, normal(width, dim).t()), strided)

    yield Sample("null sequences", (x, weight), base(slots=indices(-1, -7, 3)))
    yield Sample("null slot 0", (x, weight), base(null_slot=0))
    yield Sample("only null sequences", (x, weight), base(slots=indices(-1, -1, -1)))
    column = indices(5, 0, 3, 2, 1, dtype=torch.int64)
    table = torch.stack((column, column.roll(1)), dim=1)
    yield Sample("slot columns", (x, weight), base(slots=table))

    moved = base(write_slots=indices(1, -1, 3))
    yield Sample("write slots", (x, weight), moved)
    yield Sample("write slots, no tokens", (x[:, :0], weight), base(write_slots=indices(1, 0, 4)))

    ends = (0, 16, 18, 51)  # a power of two of tokens, fewer than a window looks back, and many
    tokens, packed = ends[-1], base(cu_seqlens=indices(*ends))
    yield Sample("packed", (normal(tokens, dim), weight), packed)
    yield Sample("packed, no cache", (normal(tokens, dim), weight), {"cu_seqlens": indices(*ends)})
    yield Sample("packed, one sequence", (normal(tokens, dim), weight), {"cu_seqlens": indices(0, tokens)})
    yield Sample("packed, no sequences", (normal(tokens, dim), weight), {"cu_seqlens": indices(0)})
    transposed = {**packed, "out": normal(dim, tokens, dtype=torch.float32).t()}
    yield Sample("packed, transposed", (normal(dim, tokens).t(), weight), transposed)
    long = {**packed, "cu_seqlens": indices(0, 5, 142, 180)}  # with tiles that are of one sequence, and others
    yield Sample("packed, channel-major", (normal(dim, 180).t(), weight), long)
    empty = {**packed, "cu_seqlens": indices(0, 0, tokens, tokens, dtype=torch.int64)}
    yield Sample("empty sequences", (normal(tokens, dim), weight), empty)
    elsewhere = {**packed, "cu_seqlens": indices(0, 0, 49, 51), "write_slots": table[:3].flip(1)}
    yield Sample("packed, write slots", (normal(tokens, dim), weight), elsewhere)
    past = {**packed, "slots": indices(5, -1, 3), "out": normal(tokens + length, dim)}
    yield Sample("tokens past the end", (normal(tokens + length, dim), weight), past)

    state = cache(extra=1, unused=1, dtype=torch.float32)
    everything = {**past, "conv_state": state, "slots": table.roll(1, 0), "null_slot": 5, "silu": False}
    yield Sample("everything", (normal(tokens + length, 3 * dim)[:, dim : 2 * dim], weight), everything)


@causal_conv1d.call_patterns(*SEQUENCE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, dim, width = random.lay_out(pattern), random.size("channels", 64), random.size("width", 4)
    options = random.sequence_arguments(words)
    if "cached" in words:
        options["conv_state"] = random.cache(width - 1, dim, dtype=random.dtype).transpose(1, 2)
    return Sample(pattern, (random.tokens(dim), random.weight(dim, width), random.weight(dim)), options)


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(6, 24\), expected \(n, length, dim\); packed sequences need"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16"),
    ("base", "x", lambda x: x[..., :20], r"weight: got shape \(24, 4\), expected \(20, 4\); its dim is the last axis"),
    ("packed", "x", lambda x: x[None], r"got shape \(1, 51, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "weight", lambda w: w.unsqueeze(1), r"got shape \(24, 1, 4\), expected \(dim, width\); squeeze"),
    ("base", "weight", lambda w: w[:, :1], "got width 1, expected a width of 2 to 8"),
    ("base", "weight", lambda w: w.repeat(1, 3), "got width 12, expected a width of 2 to 8"),
    ("base", "bias", lambda b: b[:4], r"got shape \(4,\), expected \(24,\)"),
    ("packed", "cu_seqlens", lambda c: c[:0], r"got shape \(0,\), expected \(n \+ 1,\)"),
    ("packed", "cu_seqlens", lambda c: c.half(), "got float16, expected int32 or int64"),
    ("packed", "cu_seqlens", lambda c: None, r"x: got shape \(51, 24\), expected \(n, length, dim\)"),
    ("base", "conv_state", lambda s: s[0], r"got shape \(24, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :12], r"got shape \(6, 12, 3\), expected \(6, 24, 3\)"),
    ("base", "conv_state", lambda s: s[..., :2], "got state_len 2, expected at least 3"),
    ("base", "conv_state", lambda s: s.long(), "got int64, expected float16"),
    ("no slots", "conv_state", lambda s: s[:2], "got 2 slots, expected at least 3; without slots sequence"),
    ("base", "conv_state", lambda s: None, "slots: got a tensor, expected None where there is no conv_state"),
    ("no slots", "conv_state", lambda s: None, "has_initial_state: got a tensor, expected None where there is no"),
    ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 3; give every row a slot"),
    ("write slots", "write_slots", lambda s: s.float(), "got float32, expected int32 or int64"),
    ("write slots", "write_slots", lambda s: s[:2], "got 2 rows, expected at least 3; give every row a slot"),
    ("base", "has_initial_state", lambda k: k.int(), "got int32, expected bool; compare it with 0"),
    ("base", "has_initial_state", lambda k: k[:2], r"got shape \(2,\), expected \(3,\)"),
    ("base", "out", lambda o: o[:2], r"got shape \(2, 6, 24\), expected \(3, 6, 24\)"),
)


@causal_conv1d.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
