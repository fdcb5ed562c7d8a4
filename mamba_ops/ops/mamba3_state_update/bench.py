"""What `mamba-ops bench` times of mamba3_state_update."""

import torch

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import Case
from mamba_ops.ops._common.mamba3_bench import MAMBA3, tensors
from mamba_ops.ops.mamba3_state_update.op import mamba3_state_update
from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan


def case(rows: int, device: torch.device, *, scale: str | None = None) -> Case:
    """A decode step of Mamba-3; float32 states."""
    heads, dim, dstate, *_ = MAMBA3[scale or bench.scale_of(device)]
    slots, tables = bench.slot_tables(rows, 4 * heads * dim * dstate, device)
    arguments, caches, out = tensors(rows, slots, device, scale)
    return Case(
        mamba3_state_update,
        bench.of_rows(rows),
        arguments | {"slots": tables[0]},
        caches,
        out,
        tables,
        angles=("angle_state",),
        inside=(mamba_chunk_scan,),
    )


mamba3_state_update.bench_cases(bench.by_scale(case, large=((1,), (64,)), small=((1,), (16,))))
