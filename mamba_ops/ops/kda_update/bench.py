"""What `mamba-ops bench` times of kda_update, and the peers of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import Call, Case, NotTaken
from mamba_ops.ops._common.delta_rule_bench import fla, update_case
from mamba_ops.ops.kda_update.op import kda_update

case = partial(update_case, kda_update, by_channel=True)
kda_update.bench_cases(bench.by_scale(case, large=((1,), (64,)), small=((1,), (16,))))
kda_update.bench_host("one token", 4, 1, dim=64, k_heads=4, heads=4)
kda_update.bench_peer("fla")(partial(fla, of="fla.ops.kda", name="fused_recurrent_kda"))


@kda_update.bench_peer("FlashInfer")
def _flashinfer(case: Case, module: Callable[[str], Any]) -> Call:
    """FlashInfer's decode; q, k and v are made contiguous before the clock starts."""
    kernel, given = module("flashinfer.kda").recurrent_kda, case.arguments
    if case.cache.dtype != torch.bfloat16:
        raise NotTaken("takes a bfloat16 state")
    tensors = [given[name].contiguous().unsqueeze(0) for name in ("q", "k", "v", "a", "b")]
    ends = torch.arange(case.rows + 1, dtype=torch.int32, device=case.out.device)
    options = {"A_log": given["A_log"], "dt_bias": given["dt_bias"].flatten(), "use_gate_in_kernel": True}
    options |= {"cu_seqlens": ends, "output": case.out.unsqueeze(0), "beta_is_logit": True, "backend": "cute-dsl"}

    def call(caches: Mapping[str, Tensor], slots: Tensor) -> Any:
        kernel(*tensors, initial_state=caches["ssm_state"], ssm_state_indices=slots, **options)
        return case.out

    return call
