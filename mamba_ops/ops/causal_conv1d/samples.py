"""Calls of causal_conv1d: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import short
from mamba_ops.ops.causal_conv1d.op import causal_conv1d
from mamba_ops.registry import Sample


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
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def cache(*, width: int = width, extra: int = 0, unused: int = 0, dtype: torch.dtype = state_dtype) -> Tensor:
        """Six slots, `dim` contiguous, with `extra` columns beyond width - 1 and `unused` ones between the slots."""
        return normal(6, width - 1 + extra + unused, dim, dtype=dtype)[:, unused:].transpose(1, 2)

    def indices(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    x, weight, bias, slots = normal(3, length, dim), normal(dim, width), normal(dim), indices(5, 0, 3)
    known = torch.tensor((True, False, True), device=device)

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

    ends = (0, 16, 18, 51)  # a power of two of tokens, fewer than a window looks back, and many
    tokens, packed = ends[-1], base(cu_seqlens=indices(*ends))
    yield Sample("packed", (normal(tokens, dim), weight), packed)
    yield Sample("packed, no cache", (normal(tokens, dim), weight), {"cu_seqlens": indices(*ends)})
    yield Sample("packed, one sequence", (normal(tokens, dim), weight), {"cu_seqlens": indices(0, tokens)})
    yield Sample("packed, no sequences", (normal(tokens, dim), weight), {"cu_seqlens": indices(0)})
    transposed = {**packed, "out": normal(dim, tokens, dtype=torch.float32).t()}
    yield Sample("packed, transposed", (normal(dim, tokens).t(), weight), transposed)
    empty = {**packed, "cu_seqlens": indices(0, 0, tokens, tokens, dtype=torch.int64)}
    yield Sample("empty sequences", (normal(tokens, dim), weight), empty)
    past = {**packed, "slots": indices(5, -1, 3), "out": normal(tokens + length, dim)}
    yield Sample("tokens past the end", (normal(tokens + length, dim), weight), past)
    later = {**packed, "cu_seqlens": indices(*ends) + 20, "out": normal(tokens + 20, dim)}
    yield Sample("tokens before the start", (normal(tokens + 20, dim), weight), later)

    state = cache(extra=1, unused=1, dtype=torch.float32)
    everything = {**past, "conv_state": state, "slots": table.roll(1, 0), "null_slot": 5, "silu": False}
    yield Sample("everything", (normal(tokens + length, 3 * dim)[:, dim : 2 * dim], weight), everything)
