"""The Triton kernels of causal_conv1d, and how they are launched."""

from mamba_ops.ops.causal_conv1d.triton.backward import causal_conv1d_backward as causal_conv1d_backward
from mamba_ops.ops.causal_conv1d.triton.forward import causal_conv1d as causal_conv1d
