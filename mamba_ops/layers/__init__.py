"""The layers of Mamba-family models as nn.Modules: ops mix the tokens, plain torch does everything else."""

from mamba_ops.layers.gated_delta_net import GatedDeltaNet as GatedDeltaNet
from mamba_ops.layers.hybrids import FalconH1Mamba2 as FalconH1Mamba2
from mamba_ops.layers.hybrids import OlmoGatedDeltaNet as OlmoGatedDeltaNet
from mamba_ops.layers.hybrids import ZambaMamba as ZambaMamba
from mamba_ops.layers.kimi_delta_attention import KimiDeltaAttention as KimiDeltaAttention
from mamba_ops.layers.mamba import Mamba as Mamba
from mamba_ops.layers.mamba2 import Mamba2 as Mamba2
from mamba_ops.layers.mamba3 import Mamba3 as Mamba3
from mamba_ops.layers.norms import GatedRMSNorm as GatedRMSNorm
from mamba_ops.layers.norms import gated_rms_norm as gated_rms_norm
from mamba_ops.layers.short_conv import ShortConv as ShortConv
