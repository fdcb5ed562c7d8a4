"""The Triton kernels of chunk_gated_delta_rule's backward pass."""

from mamba_ops.ops.chunk_gated_delta_rule.triton_backward.launch import (
    chunk_gated_delta_rule_backward as chunk_gated_delta_rule_backward,
)
