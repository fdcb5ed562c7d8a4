"""The ops, one file each: contract, reference, checks, outputs, samples."""

from mamba_ops.ops.causal_conv1d import causal_conv1d as causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update as causal_conv1d_update
from mamba_ops.ops.mamba2_mixing import mamba2_mixing as mamba2_mixing
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan as mamba_chunk_scan
from mamba_ops.ops.selective_state_update import selective_state_update as selective_state_update
