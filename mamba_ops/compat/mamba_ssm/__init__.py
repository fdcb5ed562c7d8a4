"""The names of mamba_ssm 2.3, over our ops: functions, modules, and the language model with its decoding."""

from mamba_ops.compat.mamba_ssm.attention import MHA as MHA
from mamba_ops.compat.mamba_ssm.blocks import Block as Block
from mamba_ops.compat.mamba_ssm.blocks import GatedMLP as GatedMLP
from mamba_ops.compat.mamba_ssm.mamba import Mamba as Mamba
from mamba_ops.compat.mamba_ssm.mamba2 import Mamba2 as Mamba2
from mamba_ops.compat.mamba_ssm.mamba2 import Mamba2Simple as Mamba2Simple
from mamba_ops.compat.mamba_ssm.mamba3 import Mamba3 as Mamba3
from mamba_ops.compat.mamba_ssm.models import MambaConfig as MambaConfig
from mamba_ops.compat.mamba_ssm.models import MambaLMHeadModel as MambaLMHeadModel
from mamba_ops.compat.mamba_ssm.norms import RMSNormGated as RMSNormGated
from mamba_ops.compat.mamba_ssm.parts import mamba_inner_fn as mamba_inner_fn
from mamba_ops.compat.mamba_ssm.scans import mamba_chunk_scan_combined as mamba_chunk_scan_combined
from mamba_ops.compat.mamba_ssm.scans import mamba_split_conv1d_scan_combined as mamba_split_conv1d_scan_combined
from mamba_ops.compat.mamba_ssm.scans import selective_state_update as selective_state_update
from mamba_ops.compat.mamba_ssm.selective_scan import selective_scan_fn as selective_scan_fn
