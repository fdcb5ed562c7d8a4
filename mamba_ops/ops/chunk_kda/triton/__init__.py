"""The Triton kernels of chunk_kda, and how they are launched."""

from mamba_ops.ops.chunk_kda.triton.backward_launch import chunk_kda_backward as chunk_kda_backward
from mamba_ops.ops.chunk_kda.triton.launch import chunk_kda as chunk_kda
