"""Prefill with Kimi Delta Attention: the gated delta rule over whole sequences, with a decay for each channel of a key.

Within a chunk what every token writes follows from a triangular system; between chunks only the state is carried.
"""

from mamba_ops.ops.chunk_kda import bench as bench
from mamba_ops.ops.chunk_kda import samples as samples
from mamba_ops.ops.chunk_kda import training as training
from mamba_ops.ops.chunk_kda.op import chunk_kda as chunk_kda
