"""The Triton kernels of chunk_gated_delta_rule, and how they are launched."""

from mamba_ops.ops.chunk_gated_delta_rule.triton.backward_launch import (
    chunk_gated_delta_rule_backward as chunk_gated_delta_rule_backward,
)
from mamba_ops.ops.chunk_gated_delta_rule.triton.launch import chunk_gated_delta_rule as chunk_gated_delta_rule
