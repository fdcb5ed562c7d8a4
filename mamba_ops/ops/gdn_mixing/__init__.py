"""gdn_mixing: the convolution and the gated delta rule of one layer, on decodes and prefills in one batch."""

from mamba_ops.ops.gdn_mixing import samples as samples
from mamba_ops.ops.gdn_mixing.op import gdn_mixing as gdn_mixing
