"""Calls of mamba_chunk_scan: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan
from mamba_ops.registry import Sample


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
    """Yield the base call, then calls that change one thing each; rows have two chunks and a half."""
    random = torch.Generator().manual_seed(0)
    length = 5 * chunk_size // 2
    tokens = 2 * length + 3

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

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

    initial: dict[str, Any] = {"has_initial_state": torch.tensor((True, False, True), device=device)}
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
    wide = normal(8, heads * dim * dstate + 24, dtype=state_dtype)
    yield sample("padded slots", ssm_state=wide[:, 8:-16].view(8, heads, dim, dstate), **initial)
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
