"""Calls of kda_update: samples, call patterns and wrong calls."""

import math
from collections.abc import Iterator

import torch

from mamba_ops.ops._common.delta_rule_samples import update_call, update_errors, update_samples
from mamba_ops.ops._common.random_inputs import UPDATE_PATTERNS, RandomInputs
from mamba_ops.ops._common.samples import SampleTensors, error_table
from mamba_ops.ops.kda_update.op import kda_update
from mamba_ops.registry import ErrorInput, Sample


@kda_update.samples
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
    given = list(update_samples(SampleTensors(device, dtype), state_dtype, sizes, by_channel=True))
    yield from given
    for base in (given[0], given[2]):
        yield Sample(f"{base.name}, lower bound", base.args, {**base.kwargs, "lower_bound": -5.0})


@kda_update.call_patterns(*UPDATE_PATTERNS)
def _call(random: RandomInputs, pattern: str) -> Sample:
    return update_call(random, pattern, by_channel=True)


@kda_update.error_inputs
def _error_inputs(device: torch.device) -> list[ErrorInput]:
    bound = "got {}, expected a number below 0, or none"
    return [
        *update_errors(device, by_channel=True),
        *error_table(
            ("base", "lower_bound", lambda _: 0.0, bound.format("0.0")),
            ("base", "lower_bound", lambda _: -math.inf, bound.format("-inf")),
            ("gates given", "lower_bound", lambda _: -5.0, "got -5.0, expected none without a and b; g is given"),
        ),
    ]
