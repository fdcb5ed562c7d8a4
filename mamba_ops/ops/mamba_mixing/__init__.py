"""mamba_mixing: the convolution and the recurrence of one Mamba-1 layer, on decodes and prefills in one batch."""

from mamba_ops.ops.mamba_mixing import samples as samples
from mamba_ops.ops.mamba_mixing.op import mamba_mixing as mamba_mixing
