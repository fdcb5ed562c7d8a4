"""mamba3_mixing: Mamba-3's recurrence of one layer, on decodes and prefills in one batch."""

from mamba_ops.ops.mamba3_mixing import samples as samples
from mamba_ops.ops.mamba3_mixing.op import mamba3_mixing as mamba3_mixing
