"""What `mamba-ops bench` times of mamba3_chunk_scan."""

import torch

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import Case
from mamba_ops.ops._common.mamba3_bench import tensors
from mamba_ops.ops.mamba3_chunk_scan.op import mamba3_chunk_scan
from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan


def case(lengths: tuple[int, ...], device: torch.device, *, scale: str | None = None) -> Case:
    """Mamba-3's scan over packed sequences that go on from states."""
    arguments, caches, out = tensors(sum(lengths), 1 + len(lengths), device, scale)
    arguments |= {"chunk_size": 64, **(where := bench.packed(lengths, device, carried=True))}
    return Case(
        mamba3_chunk_scan,
        bench.of_tokens(sum(lengths), len(lengths)),
        arguments,
        caches,
        out,
        (where["slots"],),
        products=4 * out.numel() * caches["ssm_state"].shape[-1],
        angles=("angle_state",),
        inside=(mamba_chunk_scan,),
    )


mamba3_chunk_scan.bench_cases(bench.by_scale(case, large=bench.LONG, small=bench.SHORT))
