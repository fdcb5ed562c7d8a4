"""Calls of selective_scan: samples, the patterns of a warm-up, and calls that are wrong."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops.selective_scan.op import selective_scan
from mamba_ops.registry import Sample


@selective_scan.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    dim: int = 24,
    dstate: int = 8,
    groups: int = 2,
    length: int = 37,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each; rows have two pieces and a bit."""
    random = torch.Generator().manual_seed(0)
    tokens = 2 * length + 3

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(
        name: str, *lead: int, groups: tuple[int, ...] = (groups,), dstate: int = dstate, **changes: Any
    ) -> Sample:
        """A call with tokens of shape `lead`, three rows of them by default."""
        lead = lead or (3, length)
        arguments = {
            "x": normal(*lead, dim),
            "dt": normal(*lead, dim),
            "A": -normal(dim, dstate, dtype=torch.float32).exp(),
            "B": normal(*lead, *groups, dstate),
            "C": normal(*lead, *groups, dstate),
            "D": normal(dim, dtype=torch.float32),
            "z": normal(*lead, dim),
            "dt_bias": normal(dim, dtype=torch.float32),
            "dt_softplus": True,
            "ssm_state": normal(8, dim, dstate, dtype=state_dtype),
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("x", "dt", "A", "B", "C")), arguments)

    initial: dict[str, Any] = {"has_initial_state": torch.tensor((True, False, True), device=device)}
    packed: dict[str, Any] = {"cu_seqlens": indices(0, length, length + 3, tokens)}
    yield sample("base", **initial)
    yield Sample("no optionals", tuple(a.abs() if i == 1 else a for i, a in enumerate(sample("bare").args)))
    large = normal(2, length, dim) * 20
    yield sample("dt and gate of any size", 2, length, groups=(), dt=large, dt_bias=None, z=large)
    strided = normal(3, dim, length).transpose(1, 2)
    wide = normal(8, dim * dstate + 24, dtype=state_dtype)[:, 8:-16].view(8, dim, dstate)
    major: dict[str, Any] = {"x": strided, "z": strided.flip(0)}
    major["out"] = normal(3, dim, length, dtype=torch.float32).transpose(1, 2)
    yield sample("channel-major, padded slots", groups=(1,), ssm_state=wide, **major, **initial)
    yield sample("no slots", 3, 2, dstate=2 * dstate - 1, slots=None, null_slot=0, D=None, **initial)
    yield sample("words of four states", 3, 5, dstate=4, **initial)
    moved: dict[str, Any] = {"write_slots": indices(4, 7, 0, 9), "null_slot": 7}
    empty: dict[str, Any] = {"cu_seqlens": indices(0, length, length, tokens, dtype=torch.int64)}
    yield sample("packed, null rows", tokens, slots=indices((-1, 3), (0, 1), (7, 2)), null_slot=7, **packed, **initial)
    yield sample("packed, write slots", tokens, groups=(), **moved, **packed, **initial)
    out = normal(tokens + 4, dim, dtype=torch.float32)
    yield sample("packed, empty row", tokens + 4, write_slots=indices(4, 3, 0), out=out, **empty, **initial)

    long: dict[str, Any] = {"cu_seqlens": indices(0, 135, 140, 205), "write_slots": indices(3, 2, 7)}
    yield sample("packed, long", 205, groups=(1,), **long, **initial)
    stateless: dict[str, Any] = {"ssm_state": None, "slots": None, "write_slots": indices(3, 2, 4)}
    yield sample("write slots without states", 70, cu_seqlens=indices(0, 0, 68, 70), **stateless)

    # A row of 37 tokens whose first 5 end block 1; one of 3 tokens; one of 37, 12 of them at the end of block 1.
    table = indices((1, 2, 3, 4, 5), (6, -1, 6, 6, 6), (7, 0, 8, -1, 9), dtype=torch.int64)
    ends = indices(5, 21, 37, 40, 52, 56, 77)
    prefix: dict[str, Any] = {
        "ssm_state": normal(10, dim, dstate, dtype=state_dtype),
        "slots": table,
        "block_size": 16,
        "first_block": indices(1, 0, 1),
        "last_block": indices(4, 0, 4),
        "initial_block": indices(0, 1, 0),
        "chunk_ends": ends,
        "last_chunk": indices(2, 3, 6),
    }
    if length == 37:
        yield sample("prefix cache", tokens, **packed, **initial, **prefix)
