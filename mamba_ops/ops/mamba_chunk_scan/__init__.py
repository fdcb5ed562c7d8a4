"""Prefill for Mamba-2: the selective state space recurrence (SSD) over whole sequences, computed chunk by chunk.

Within a chunk the recurrence is a masked product of matrices; between chunks only the state is carried.
"""

from mamba_ops.ops.mamba_chunk_scan import bench as bench
from mamba_ops.ops.mamba_chunk_scan import samples as samples
from mamba_ops.ops.mamba_chunk_scan import training as training
from mamba_ops.ops.mamba_chunk_scan.op import mamba_chunk_scan as mamba_chunk_scan
