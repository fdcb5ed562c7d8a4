"""rms_norm: groups of channels over the root of their mean square, with a residual and a gate, in one pass."""

from mamba_ops.ops.rms_norm import bench as bench
from mamba_ops.ops.rms_norm import samples as samples
from mamba_ops.ops.rms_norm.op import rms_norm as rms_norm
