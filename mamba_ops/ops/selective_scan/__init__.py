"""Prefill for Mamba-1: the selective scan over whole sequences, where every channel has its own state."""

from mamba_ops.ops.selective_scan import bench as bench
from mamba_ops.ops.selective_scan import samples as samples
from mamba_ops.ops.selective_scan import training as training
from mamba_ops.ops.selective_scan.op import selective_scan as selective_scan
