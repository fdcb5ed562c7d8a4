"""causal_conv1d_update: the depthwise convolution of a decode step, over a cache of each row's last inputs."""

from mamba_ops.ops.causal_conv1d_update import bench as bench
from mamba_ops.ops.causal_conv1d_update import samples as samples
from mamba_ops.ops.causal_conv1d_update.op import causal_conv1d_update as causal_conv1d_update
