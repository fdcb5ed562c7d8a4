"""Prefill with the gated delta rule: the recurrence over whole sequences, computed chunk by chunk.

Within a chunk what every token writes follows from a triangular system; between chunks only the state is carried.
"""

from mamba_ops.ops.chunk_gated_delta_rule import bench as bench
from mamba_ops.ops.chunk_gated_delta_rule import samples as samples
from mamba_ops.ops.chunk_gated_delta_rule import training as training
from mamba_ops.ops.chunk_gated_delta_rule.op import chunk_gated_delta_rule as chunk_gated_delta_rule
