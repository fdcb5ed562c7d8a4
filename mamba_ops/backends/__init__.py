"""The backends, one file each: the adapters that fit a vendor's kernels to the ops."""

from mamba_ops.backends import flashinfer as flashinfer
from mamba_ops.backends import sycl as sycl
from mamba_ops.backends import triton as triton
