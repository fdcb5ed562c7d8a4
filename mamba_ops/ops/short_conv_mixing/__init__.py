"""short_conv_mixing: the gated short convolution of one layer, on decodes and prefills in one batch."""

from mamba_ops.ops.short_conv_mixing import samples as samples
from mamba_ops.ops.short_conv_mixing.op import short_conv_mixing as short_conv_mixing
