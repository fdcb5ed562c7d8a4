"""FlashInfer on CUDA: decode for Mamba-2, and the gated delta rule where the GPU has it."""

from mamba_ops.backends.flashinfer import delta_rule as delta_rule
from mamba_ops.backends.flashinfer import mamba as mamba
from mamba_ops.backends.flashinfer.vendor import flashinfer as flashinfer
