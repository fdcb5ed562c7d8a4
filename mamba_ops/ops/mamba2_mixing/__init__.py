"""mamba2_mixing: the convolution and the recurrence of one Mamba-2 layer, on decodes and prefills in one batch."""

from mamba_ops.ops.mamba2_mixing import samples as samples
from mamba_ops.ops.mamba2_mixing.op import mamba2_mixing as mamba2_mixing
