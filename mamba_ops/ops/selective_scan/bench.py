"""What `mamba-ops bench` times of selective_scan, and the peer of it."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import LARGE, MAMBA1, Build, Call, Case
from mamba_ops.ops.selective_scan.op import selective_scan

OF_TOKENS = ("x", "dt", "z", "B", "C")

selective_scan.bench_host("rows", 1, 128, channels=256)


def case(lengths: tuple[int, ...], device: torch.device, *, dim: int | None = None, scale: str | None = None) -> Case:
    """The scan of a Mamba-1 layer from no state; x and z, and B and C, are views of one tensor each, as the projections
    are."""
    channels, dstate, rank = MAMBA1[scale or bench.scale_of(device)]
    dim = dim or channels
    tokens, make = sum(lengths), partial(bench.random, device=device)
    x, z = make(tokens, 2 * dim).split(dim, dim=1)
    _, B, C = make(tokens, rank + 2 * dstate).split([rank, dstate, dstate], dim=1)
    where = bench.packed(lengths, device)
    arguments = {
        "x": x,
        "dt": make(tokens, dim),
        "A": -1 - 15 * torch.rand(dim, dstate, device=device),
        "B": B,
        "C": C,
        "D": torch.randn(dim, device=device),
        "z": z,
        "dt_bias": torch.randn(dim, device=device) - 3,
        **where,
        "dt_softplus": True,
    }
    return Case(
        selective_scan,
        bench.of_tokens(tokens, len(lengths), *[f"{dim} channels"] * (dim != channels)),
        arguments,
        {"ssm_state": torch.randn(1 + len(lengths), dim, dstate, device=device)},
        make(tokens, dim),
        (where["slots"],),
        reads_caches=False,
        exponentials=tokens * dim * dstate,
    )


@selective_scan.bench_cases
def _cases(scale: str) -> Iterator[Build]:
    if scale != LARGE:
        yield from (partial(case, lengths, scale=scale) for lengths in ((256,), (64,) * 4))
        return
    yield from (partial(case, (tokens,)) for tokens in (512, 2048, 8192))
    yield partial(case, (1024,) * 8, dim=4096)
    yield lambda device: bench.channel_major(case((8192,), device), *OF_TOKENS)


@selective_scan.bench_peer("mamba_ssm")
def _mamba_ssm(case: Case, module: Callable[[str], Any]) -> Call:
    """mamba_ssm's kernel has a dense batch with a channel's tokens adjacent, as it requires, and no slots."""
    scan = module("selective_scan_cuda").fwd
    rows, given = bench.batched(case), case.arguments
    x, dt, z, B, C = (given[n].unflatten(0, (rows, -1)).transpose(1, 2).contiguous() for n in OF_TOKENS)
    A, D, dt_bias, softplus = (given[name] for name in ("A", "D", "dt_bias", "dt_softplus"))
    B, C = B.unsqueeze(1), C.unsqueeze(1)

    def call(caches: Mapping[str, Tensor], _: Tensor) -> Any:
        _, states, out = scan(x, dt, A, B, C, D, z, dt_bias, softplus)
        caches["ssm_state"][1:].copy_(states[:, :, -1, 1::2])
        return out.transpose(1, 2).flatten(0, 1)

    return call
