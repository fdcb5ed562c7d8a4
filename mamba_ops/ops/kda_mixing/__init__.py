"""kda_mixing: the convolution and Kimi Delta Attention of one layer, on decodes and prefills in one batch."""

from mamba_ops.ops.kda_mixing import samples as samples
from mamba_ops.ops.kda_mixing.op import kda_mixing as kda_mixing
