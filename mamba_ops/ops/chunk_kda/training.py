"""The gradients of chunk_kda: its companions for training."""

import math

import torch

from mamba_ops.ops._common.delta_rule import unsupported_by_triton
from mamba_ops.ops._common.delta_rule_training import record_gradients
from mamba_ops.ops.chunk_kda.op import chunk_kda

record_gradients(
    chunk_kda,
    "mamba_ops.ops.chunk_kda.reference_backward:chunk_kda_backward",
    "mamba_ops.ops.chunk_kda.triton:chunk_kda_backward",
    unsupported_by_triton,
)


@chunk_kda.flops
def _flops(q: torch.Size, v: torch.Size) -> tuple[int, int]:
    """Of the matrix products of chunks of 64 tokens, in which half of all pairs of tokens count."""
    tokens, k_dim, (v_heads, v_dim) = math.prod(v[:-2]), q[-1], v[-2:]
    pairs, read = tokens * 64 // 2 * v_heads, tokens * v_heads * v_dim * k_dim
    forward = 2 * (pairs * 2 * (k_dim + v_dim) + 3 * read)
    return forward, 2 * (pairs * (6 * k_dim + 4 * v_dim) + 8 * read)
