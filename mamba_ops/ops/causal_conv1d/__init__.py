"""causal_conv1d: the depthwise convolution of whole sequences, which may go on where a cache left off."""

from mamba_ops.ops.causal_conv1d import bench as bench
from mamba_ops.ops.causal_conv1d import samples as samples
from mamba_ops.ops.causal_conv1d import training as training
from mamba_ops.ops.causal_conv1d.op import causal_conv1d as causal_conv1d
