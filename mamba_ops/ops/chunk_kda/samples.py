"""Calls of chunk_kda: samples, call patterns and wrong calls."""

from collections.abc import Iterator

import torch

from mamba_ops.ops._common.delta_rule_samples import prefill_call, prefill_errors, prefill_samples
from mamba_ops.ops._common.random_inputs import SEQUENCE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors
from mamba_ops.ops.chunk_kda.op import chunk_kda
from mamba_ops.registry import ErrorInput, Sample


@chunk_kda.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
    length: int = 75,
) -> Iterator[Sample]:
    sizes = {"k_heads": k_heads, "v_heads": v_heads, "k_dim": k_dim, "v_dim": v_dim}
    return prefill_samples(SampleTensors(device, dtype), state_dtype, sizes, length, by_channel=True)


@chunk_kda.call_patterns(*SEQUENCE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    return prefill_call(random, pattern, by_channel=True)


@chunk_kda.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    return prefill_errors(by_channel=True)
