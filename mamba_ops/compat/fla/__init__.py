"""The names of flash-linear-attention 0.6 for the gated delta rule and KDA, over our ops; and modules beside them."""

from mamba_ops.compat.fla.convolution import ShortConvolution as ShortConvolution
from mamba_ops.compat.fla.delta_rule import chunk_gated_delta_rule as chunk_gated_delta_rule
from mamba_ops.compat.fla.delta_rule import fused_recurrent_gated_delta_rule as fused_recurrent_gated_delta_rule
from mamba_ops.compat.fla.kda import chunk_kda as chunk_kda
from mamba_ops.compat.fla.kda import fused_recurrent_kda as fused_recurrent_kda
from mamba_ops.compat.fla.norms import FusedRMSNormGated as FusedRMSNormGated
from mamba_ops.compat.fla.norms import RMSNorm as RMSNorm
from mamba_ops.compat.fla.norms import l2norm as l2norm
