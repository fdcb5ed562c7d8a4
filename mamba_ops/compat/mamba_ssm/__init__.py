"""The names of mamba_ssm 2.3, over our ops: functions, modules, and the language model with its decoding."""

from mamba_ops.compat.mamba_ssm.scans import mamba_chunk_scan_combined as mamba_chunk_scan_combined
from mamba_ops.compat.mamba_ssm.scans import mamba_split_conv1d_scan_combined as mamba_split_conv1d_scan_combined
from mamba_ops.compat.mamba_ssm.scans import selective_scan_fn as selective_scan_fn
from mamba_ops.compat.mamba_ssm.scans import selective_state_update as selective_state_update
