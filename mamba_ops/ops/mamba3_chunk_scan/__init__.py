"""mamba3_chunk_scan: Mamba-3's recurrence over whole sequences."""

from mamba_ops.ops.mamba3_chunk_scan import bench as bench
from mamba_ops.ops.mamba3_chunk_scan import samples as samples
from mamba_ops.ops.mamba3_chunk_scan import training as training
from mamba_ops.ops.mamba3_chunk_scan.op import mamba3_chunk_scan as mamba3_chunk_scan
