"""The records of the backends: each one's name, devices, what it needs, its priority and settings."""

from mamba_ops.backends.flashinfer import flashinfer as flashinfer
from mamba_ops.backends.sycl import sycl as sycl
from mamba_ops.backends.triton import triton as triton
