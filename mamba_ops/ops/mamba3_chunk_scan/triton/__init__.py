"""The Triton kernels of mamba3_chunk_scan, and how they are launched."""

from mamba_ops.ops.mamba3_chunk_scan.triton.launch import mamba3_chunk_scan as mamba3_chunk_scan
