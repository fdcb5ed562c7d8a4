"""Calls of rms_norm: samples, call patterns and wrong calls."""

from collections.abc import Iterator
from typing import Any

import torch

from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.rms_norm.op import rms_norm
from mamba_ops.registry import ErrorInput, Sample


@rms_norm.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    dim: int = 48,
    heads: int = 3,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; a head has `dim` channels, as a token has without
    heads, and residuals are of the `state_dtype`.
    """
    make = SampleTensors(device, dtype)
    normal, weight = make.normal, make.normal(dim)
    float32 = torch.float32

    def gated(*shape: int, **options: Any) -> dict[str, Any]:
        return {"gate": normal(*shape), **options}

    def carried(*shape: int, residual: torch.dtype = state_dtype, total: torch.dtype = state_dtype) -> dict[str, Any]:
        return {"residual": normal(*shape, dtype=residual), "total": normal(*shape, dtype=total)}

    yield Sample("base", (normal(5, dim), weight), gated(5, dim))
    yield Sample("no optional", (normal(5, dim),), {})
    yield Sample("no gate", (normal(5, dim), weight), {"eps": 0.25})
    yield Sample("norm first", (normal(5, dim), weight), gated(5, dim, norm_before_gate=True))
    yield Sample("sigmoid", (normal(5, dim), weight), gated(5, dim, sigmoid_gate=True))
    yield Sample("norm first, sigmoid", (normal(5, dim), None), gated(5, dim, norm_before_gate=True, sigmoid_gate=True))
    yield Sample("groups", (normal(5, dim), weight), gated(5, dim, groups=2))
    yield Sample("groups, norm first", (normal(2, 3, dim), weight), gated(2, 3, dim, groups=4, norm_before_gate=True))
    yield Sample("groups of one channel", (normal(2, dim), weight), {"groups": dim})
    yield Sample("residual", (normal(5, dim), weight), carried(5, dim))
    yield Sample("residual alone", (normal(5, dim), weight), {"residual": normal(5, dim)})
    narrow = carried(2, 3, dim, residual=dtype, total=dtype)
    yield Sample("narrow residual", (normal(2, 3, dim), weight), narrow)
    yield Sample("total without residual", (normal(5, dim), weight), {"total": normal(5, dim, dtype=float32)})

    yield Sample("one channel", (normal(5, 1), normal(1)), gated(5, 1))
    yield Sample("odd channels", (normal(5, dim - 1), normal(dim - 1)), gated(5, dim - 1))
    yield Sample("one row", (normal(1, dim), weight), gated(1, dim))
    yield Sample("one token", (normal(dim), weight), gated(dim))
    yield Sample("no rows", (normal(0, dim), weight), {**gated(0, dim), **carried(0, dim)})
    yield Sample("no tokens", (normal(2, 0, heads, dim), weight), gated(2, 0, heads, dim))
    yield Sample("heads", (normal(2, 9, heads, dim), weight), gated(2, 9, heads, dim, norm_before_gate=True))
    for other in (torch.float16, float32):
        arguments = normal(5, dim, dtype=other), normal(dim, dtype=other)
        yield Sample(short(other), arguments, {"gate": normal(5, dim, dtype=other)})
    mixed = {"gate": normal(5, dim, dtype=float32), "residual": normal(5, dim), "total": normal(5, dim)}
    mixed |= {"out": normal(5, dim, dtype=torch.float16)}
    yield Sample("mixed dtypes", (normal(5, dim, dtype=float32), weight.float()), mixed)

    wide = {"gate": normal(5, 2 * dim + 8)[:, 8 : dim + 8]}
    yield Sample("sliced gate", (normal(5, dim), weight), wide)
    apart = {"gate": normal(2, 4, 2 * heads * dim + 5)[..., 5 : heads * dim + 5].view(2, 4, heads, dim)}
    yield Sample("sliced gate, heads", (normal(2, 4, heads, dim), weight), apart)
    residual = normal(2, dim, 5, dtype=float32).mT
    transposed = {"gate": normal(2, dim, 5).mT, "residual": residual, "out": normal(2, dim, 5).mT}
    yield Sample("transposed", (normal(2, dim, 5).mT, weight), transposed)
    heads_first = {"gate": normal(2, heads, 4, dim).transpose(1, 2)}
    yield Sample("heads first", (normal(2, 4, heads, dim), weight), heads_first)
    strided = {
        "residual": normal(2, 4, dim, heads).mT,
        "total": normal(2, 4, dim, heads).mT,
        "out": normal(4, 2, heads, dim).transpose(0, 1),
    }
    yield Sample("strided residual and out", (normal(2, 4, heads, dim), normal(2 * dim)[::2]), strided)
    parts = {"gate": normal(4, 2, dim).transpose(0, 1), "groups": 2}
    yield Sample("groups, tokens first", (normal(2, 4, dim), weight), parts)

    everything = {
        **gated(2, 3, dim, groups=2, eps=1e-3, norm_before_gate=True, sigmoid_gate=True),
        **carried(2, 3, dim, total=torch.float16),
        "out": normal(2, 3, dim, dtype=float32),
    }
    yield Sample("everything", (normal(2, 3, 2 * dim)[..., dim:], weight), everything)


@rms_norm.call_patterns("one token", "rows", "rows heads", "one token residual", "rows residual")
def _call(random: RandomInputs, pattern: str) -> Sample:
    """Gates of Mamba-2, those of a delta rule's heads, and norms between layers."""
    words, dim = random.lay_out(pattern), random.size("dim", 64)
    if "residual" in words:
        summed = {"residual": random.tokens(dim, dtype=torch.float32), "total": random.tokens(dim, dtype=torch.float32)}
        return Sample(pattern, (random.tokens(dim), random.weight(dim)), summed)
    trail = (random.size("heads", 4), dim) if "heads" in words else (dim,)
    options: dict[str, Any] = {"norm_before_gate": True} if "heads" in words else {"groups": random.size("groups", 1)}
    arguments = random.tokens(*trail), random.weight(dim)
    return Sample(pattern, arguments, {"gate": random.tokens(*trail), **options})


_ERROR_INPUTS = error_table(
    ("no optional", "x", lambda x: x[0, 0], r"got shape \(\), expected \(\.\.\., size\)"),
    ("base", "x", lambda x: x.int(), "got int32, expected float16, bfloat16, float32 or float64"),
    ("base", "x", lambda x: x[:, :20], r"weight: got shape \(48,\), expected \(20,\); its size is the last axis of x"),
    ("base", "weight", lambda w: w[:4], r"got shape \(4,\), expected \(48,\); its size"),
    ("base", "weight", lambda w: w.long(), "got int64, expected float16"),
    ("base", "gate", lambda g: g[:2], r"got shape \(2, 48\), expected \(5, 48\); it is like x"),
    ("base", "gate", lambda g: g.bool(), "got bool, expected float16"),
    ("residual", "residual", lambda r: r[0], r"got shape \(48,\), expected \(5, 48\); it is like x"),
    ("residual", "total", lambda t: t[None], r"got shape \(1, 5, 48\), expected \(5, 48\); it is like x"),
    ("residual", "total", lambda t: t.int(), "got int32, expected float16"),
    ("groups", "groups", lambda g: 0, "got 0, expected a divisor of 48, the channels of x"),
    ("groups", "groups", lambda g: 5, "got 5, expected a divisor of 48, the channels of x"),
    ("base", "out", lambda o: o[:2], r"got shape \(2, 48\), expected \(5, 48\); it is like x"),
)


@rms_norm.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return _ERROR_INPUTS
