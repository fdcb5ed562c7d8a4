"""The gradients of chunk_gated_delta_rule: its companions for training."""

import math

import torch

from mamba_ops.ops._common.delta_rule import BackwardArguments as BackwardArguments
from mamba_ops.ops._common.delta_rule import unsupported_by_triton
from mamba_ops.ops._common.delta_rule_training import record_gradients
from mamba_ops.ops.chunk_gated_delta_rule.op import chunk_gated_delta_rule

record_gradients(
    chunk_gated_delta_rule,
    "mamba_ops.ops.chunk_gated_delta_rule.reference_backward:chunk_gated_delta_rule_backward",
    "mamba_ops.ops.chunk_gated_delta_rule.triton:chunk_gated_delta_rule_backward",
    unsupported_by_triton,
)


@chunk_gated_delta_rule.flops
def _flops(q: torch.Size, v: torch.Size) -> tuple[int, int]:
    """Of the matrix products of chunks of 64 tokens, in which half of all pairs of tokens count."""
    tokens, (k_heads, k_dim), (v_heads, v_dim) = math.prod(v[:-2]), q[-2:], v[-2:]
    pairs, read = tokens * 64 // 2, tokens * v_heads * v_dim * k_dim
    forward = 2 * (pairs * 2 * (k_heads * k_dim + v_heads * v_dim) + 3 * read)
    return forward, 2 * (pairs * (2 * k_heads * k_dim + v_heads * (4 * v_dim + 3 * k_dim)) + 8 * read)
