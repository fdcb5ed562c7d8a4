"""The records of the backends: name, devices, requirements, priority and settings of each."""

from mamba_ops.backends.cpp import cpp as cpp
from mamba_ops.backends.flashinfer import flashinfer as flashinfer
from mamba_ops.backends.sycl import sycl as sycl
from mamba_ops.backends.triton import triton as triton
