"""The ops, a folder each. Adding one adds its line here: it is public then, and all that runs over the ops finds it."""

from typing import TYPE_CHECKING

from mamba_ops.ops._common import bench as bench
from mamba_ops.ops._common import slots as slots
from mamba_ops.ops._common.sequences import NULL_SLOT as NULL_SLOT
from mamba_ops.ops.causal_conv1d import causal_conv1d as causal_conv1d
from mamba_ops.ops.causal_conv1d_update import causal_conv1d_update as causal_conv1d_update
from mamba_ops.ops.chunk_gated_delta_rule import chunk_gated_delta_rule as chunk_gated_delta_rule
from mamba_ops.ops.chunk_kda import chunk_kda as chunk_kda
from mamba_ops.ops.gated_delta_rule_update import gated_delta_rule_update as gated_delta_rule_update
from mamba_ops.ops.gdn_mixing import gdn_mixing as gdn_mixing
from mamba_ops.ops.kda_mixing import kda_mixing as kda_mixing
from mamba_ops.ops.kda_update import kda_update as kda_update
from mamba_ops.ops.mamba2_mixing import mamba2_mixing as mamba2_mixing
from mamba_ops.ops.mamba3_chunk_scan import mamba3_chunk_scan as mamba3_chunk_scan
from mamba_ops.ops.mamba3_mixing import mamba3_mixing as mamba3_mixing
from mamba_ops.ops.mamba3_state_update import mamba3_state_update as mamba3_state_update
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan as mamba_chunk_scan
from mamba_ops.ops.mamba_mixing import mamba_mixing as mamba_mixing
from mamba_ops.ops.rms_norm import rms_norm as rms_norm
from mamba_ops.ops.selective_scan import selective_scan as selective_scan
from mamba_ops.ops.selective_state_update import selective_state_update as selective_state_update
from mamba_ops.ops.short_conv_mixing import short_conv_mixing as short_conv_mixing
from mamba_ops.registry import Op

if not TYPE_CHECKING:  # a type checker goes by the imports, and takes computed names for none
    __all__ = [name for name, value in globals().items() if isinstance(value, Op)]
