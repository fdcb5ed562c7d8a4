"""Calls of gated_delta_rule_update: samples, call patterns and wrong calls."""

from collections.abc import Iterator

import torch

from mamba_ops.ops._common.delta_rule_samples import update_call, update_errors, update_samples
from mamba_ops.ops._common.random_inputs import UPDATE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors
from mamba_ops.ops.gated_delta_rule_update.op import gated_delta_rule_update
from mamba_ops.registry import ErrorInput, Sample


@gated_delta_rule_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
) -> Iterator[Sample]:
    sizes = {"k_heads": k_heads, "v_heads": v_heads, "k_dim": k_dim, "v_dim": v_dim}
    return update_samples(SampleTensors(device, dtype), state_dtype, sizes, by_channel=False)


@gated_delta_rule_update.call_patterns(*UPDATE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    return update_call(random, pattern, by_channel=False)


@gated_delta_rule_update.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return update_errors(device, by_channel=False)
