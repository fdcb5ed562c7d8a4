"""The namespace of all ops here: `torch.ops.mamba_ops`."""

from mamba_ops.registry import Namespace

mamba = Namespace("mamba_ops")
