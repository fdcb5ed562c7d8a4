"""Calls of causal_conv1d_update: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.random_inputs import SPECULATED, UPDATE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.causal_conv1d_update.op import causal_conv1d_update
from mamba_ops.registry import ErrorInput, Sample


@causal_conv1d_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.bfloat16,
    dim: int = 24,
    width: int = 4,
    length: int = 3,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; `length` is the number of tokens of a longer row."""
    make = SampleTensors(device, dtype)
    normal, indices = make.normal, make.indices

    def cache(*, width: int = width, extra: int = 0, unused: int = 0, dtype: torch.dtype = state_dtype) -> Tensor:
        """Six slots, `dim` contiguous, with `extra` columns beyond width - 1 and `unused` ones between the slots."""
        return normal(6, width - 1 + extra + unused, dim, dtype=dtype)[:, unused:].transpose(1, 2)

    weight, slots = normal(dim, width), indices(5, 0, 3, 2)
    base: dict[str, Any] = {"bias": normal(dim), "slots": slots}
    varlen = {**base, "cu_seqlens": indices(0, length, length + 1, 2 * length + 1, 3 * length + 1)}
    tokens = 3 * length + 1
    spec = {"num_accepted_tokens": indices(1, length, 2, 1)}

    yield Sample("base", (normal(4, dim), cache(), weight), base)
    yield Sample("no optional", (normal(4, dim), cache(), weight), {})
    yield Sample("no bias", (normal(4, dim), cache(), weight), {"slots": slots})
    yield Sample("no slots", (normal(4, dim), cache(), weight), {"bias": base["bias"]})
    yield Sample("no silu", (normal(4, dim), cache(), weight), {**base, "silu": False})
    for other in (2, 8):
        yield Sample(f"width {other}", (normal(4, dim), cache(width=other), normal(dim, other)), base)
    yield Sample("one row", (normal(1, dim), cache(), weight), base)
    yield Sample("no rows", (normal(0, dim), cache(), weight), base)
    for other_dtype in (torch.float16, torch.float32):
        other_base = {"bias": normal(dim, dtype=other_dtype), "slots": slots}
        arguments = normal(4, dim, dtype=other_dtype), cache(dtype=other_dtype), normal(dim, width, dtype=other_dtype)
        yield Sample(short(other_dtype), arguments, other_base)
    mixed = {**base, "out": normal(4, dim, dtype=torch.float32)}
    yield Sample("mixed dtypes", (normal(4, dim), cache(dtype=torch.float16), weight.float()), mixed)

    yield Sample("columns contiguous", (normal(4, dim), cache().contiguous(), weight), base)
    yield Sample("padded slots", (normal(4, dim), cache(unused=2), weight), base)
    yield Sample("more columns", (normal(4, dim), cache(extra=2), weight), base)
    yield Sample("sliced x", (normal(4, 2 * dim)[:, dim:], cache(), weight), base)
    yield Sample("transposed x", (normal(dim, 4).t(), cache(), weight), base)
    strided = {**base, "bias": normal(2 * dim)[::2], "out": normal(dim, 4).t()}
    yield Sample("strided weights and out", (normal(4, dim), cache(), normal(width, dim).t()), strided)

    yield Sample("null rows", (normal(4, dim), cache(), weight), {**base, "slots": indices(5, -1, -7, 2)})
    yield Sample("null slot 0", (normal(4, dim), cache(), weight), {**base, "null_slot": 0})
    yield Sample("only null rows", (normal(4, dim), cache(), weight), {**base, "slots": indices(-1, -1, -1, -1)})
    column = indices(5, 0, 3, 2, 1, dtype=torch.int64)
    table = torch.stack((column, column.roll(1)), dim=1)
    yield Sample("slot columns", (normal(4, dim), cache(), weight), {**base, "slots": table})

    yield Sample("rows of length", (normal(4, length, dim), cache(), weight), base)
    transposed = {**base, "out": normal(4, dim, length).transpose(1, 2)}
    yield Sample("rows of length, transposed", (normal(4, dim, length).transpose(1, 2), cache(), weight), transposed)
    yield Sample("rows of no length", (normal(4, 0, dim), cache(), weight), base)
    yield Sample("packed", (normal(tokens, dim), cache(), weight), varlen)
    empty = {**varlen, "cu_seqlens": indices(0, 0, tokens, tokens, tokens, dtype=torch.int64)}
    yield Sample("empty rows", (normal(tokens, dim), cache(), weight), empty)
    past = {**varlen, "out": normal(tokens + 2, dim)}
    yield Sample("tokens past the end", (normal(tokens + 2, dim), cache(), weight), past)

    last = {**base, "newest_last": True}
    yield Sample("newest last", (normal(4, dim), cache(extra=1), weight), last)
    yield Sample("newest last, columns contiguous", (normal(4, dim), cache(extra=2).contiguous(), weight), last)
    yield Sample("newest last, rows of length", (normal(4, length, dim), cache(extra=1), weight), last)
    packed_last = {**empty, "newest_last": True}
    yield Sample("newest last, packed, empty rows", (normal(tokens, dim), cache(extra=3), weight), packed_last)

    yield Sample("speculative, one token", (normal(4, dim), cache(extra=length - 1), weight), {**base, **spec})
    speculative = normal(4, length, dim), cache(extra=length - 1), weight
    yield Sample("speculative", speculative, {**base, **spec})
    yield Sample("speculative, packed", (normal(tokens, dim), cache(extra=length - 1), weight), {**varlen, **spec})
    yield Sample("speculative, empty rows", (normal(tokens, dim), cache(extra=length - 1), weight), {**empty, **spec})
    counts = {"num_accepted_tokens": indices(0, 1, 1, 0, dtype=torch.int64)}
    yield Sample("speculative, columns dropped", (normal(tokens, dim), cache(), weight), {**varlen, **counts})
    counts = {"num_accepted_tokens": indices(0, length, 2, 1, dtype=torch.int64)}
    yield Sample("all accepted, and none", (normal(4, dim), cache(extra=length - 1), weight), {**base, **counts})

    everything = {**past, **spec, "slots": table.roll(1, 0), "null_slot": 5, "silu": False}
    x = normal(tokens + 2, 3 * dim)[:, dim : 2 * dim]
    yield Sample("everything", (x, cache(extra=length - 1, unused=1, dtype=torch.float32), weight), everything)


@causal_conv1d_update.call_patterns(*UPDATE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    words, dim, width = random.lay_out(pattern), random.size("channels", 64), random.size("width", 4)
    state = random.cache(width - 1 + SPECULATED, dim, dtype=random.dtype).transpose(1, 2)
    arguments = random.tokens(dim), state, random.weight(dim, width), random.weight(dim)
    return Sample(pattern, arguments, random.update_arguments(words))


_ERROR_INPUTS = error_table(
    ("base", "x", lambda x: x[0], r"got shape \(24,\), expected \(n, dim\) or \(n, length, dim\)"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16, bfloat16, float32 or float64"),
    ("base", "x", lambda x: x[:, :20], r"weight: got shape \(24, 4\), expected \(20, 4\); its dim is the last axis"),
    ("packed", "x", lambda x: x[None], r"got shape \(1, 10, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "conv_state", lambda s: s[0], r"got shape \(24, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :12], r"got shape \(6, 12, 3\), expected \(6, 24, 3\)"),
    ("base", "conv_state", lambda s: s[..., :2], "got state_len 2, expected at least 3"),
    ("base", "conv_state", lambda s: s.long(), "got int64, expected float16"),
    ("no slots", "conv_state", lambda s: s[:2], "got 2 slots, expected at least 4; without slots row i"),
    ("base", "weight", lambda w: w.unsqueeze(1), r"got shape \(24, 1, 4\), expected \(dim, width\); squeeze"),
    ("base", "weight", lambda w: w[:, :1], "got width 1, expected a width of 2 to 8"),
    ("base", "weight", lambda w: w.repeat(1, 3), "got width 12, expected a width of 2 to 8"),
    ("base", "bias", lambda b: b[:4], r"got shape \(4,\), expected \(24,\)"),
    ("base", "slots", lambda s: s.float(), "got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "got 2 rows, expected at least 4; give every row a slot"),
    ("base", "slots", lambda s: s[None, None], r"got shape \(1, 1, 4\), expected \(rows,\) or \(rows, columns\)"),
    ("packed", "cu_seqlens", lambda c: c[:0], r"got shape \(0,\), expected \(n \+ 1,\)"),
    ("packed", "cu_seqlens", lambda c: c.half(), "got float16, expected int32 or int64"),
    ("speculative", "num_accepted_tokens", lambda a: a[:3], r"got shape \(3,\), expected \(4,\)"),
    ("speculative", "num_accepted_tokens", lambda a: a.bool(), "got bool, expected int32 or int64"),
    ("speculative", "conv_state", lambda s: s[..., :4], "got state_len 4, expected at least 5"),
    ("newest last", "conv_state", lambda s: s.repeat(1, 1, 2), "got state_len 8, expected at most 7 with newest_last"),
    ("speculative", "newest_last", lambda _: True, "got True, expected False with num_accepted_tokens; which inputs"),
    ("base", "out", lambda o: o[:2], r"got shape \(2, 24\), expected \(4, 24\)"),
)


@causal_conv1d_update.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
