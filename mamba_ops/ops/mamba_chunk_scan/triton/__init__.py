"""The Triton kernels of mamba_chunk_scan, and how they are launched."""

from mamba_ops.ops.mamba_chunk_scan.triton.backward_launch import (
    mamba_chunk_scan_backward as mamba_chunk_scan_backward,
)
from mamba_ops.ops.mamba_chunk_scan.triton.launch import mamba_chunk_scan as mamba_chunk_scan
