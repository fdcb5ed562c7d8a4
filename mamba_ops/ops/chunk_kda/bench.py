"""What `mamba-ops bench` times of chunk_kda, and the peers of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import Calls, Case
from mamba_ops.ops._common.delta_rule_bench import fla, prefill_case
from mamba_ops.ops.chunk_kda.op import chunk_kda

case = partial(prefill_case, chunk_kda, by_channel=True)
chunk_kda.bench_cases(bench.by_scale(case, large=bench.LONG, small=bench.SHORT))
chunk_kda.bench_host("rows", 1, 64, dim=64, k_heads=4, heads=4)
chunk_kda.bench_peer("fla")(partial(fla, of="fla.ops.kda", name="chunk_kda"))


@chunk_kda.bench_peer("FlashInfer")
def _flashinfer(case: Case, module: Callable[[str], Any]) -> Calls:
    """cuDNN's prefill, by FlashInfer: once with a copy of our states, for errors, and once bare, for times."""
    kernel, given = module("flashinfer.cudnn").cudnn_recurrent_kda, case.arguments
    tensors = [given[name].contiguous() for name in ("q", "k", "v", "g")] + [given["beta"].float()]
    starts, ends = case.named(case.cache).float(), given["cu_seqlens"]
    last = torch.empty_like(starts)
    options = {"cu_seqlens": ends, "output": case.out, "output_state": last, "output_final_state": True}

    def timed(_: Mapping[str, Tensor], slots: Tensor) -> Any:
        kernel(*tensors, initial_state=starts, **options)
        return case.out

    def checked(caches: Mapping[str, Tensor], slots: Tensor) -> Any:
        timed(caches, slots)
        caches["ssm_state"][slots.long()] = last.to(case.cache.dtype)
        return case.out

    return Calls(checked, timed)
