"""The Triton kernels of selective_scan, and how they are launched."""

from mamba_ops.ops.selective_scan.triton.backward import selective_scan_backward as selective_scan_backward
from mamba_ops.ops.selective_scan.triton.launch import selective_scan as selective_scan
