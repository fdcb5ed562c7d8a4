"""The backend `sycl`: Intel's SYCL kernels, from vllm_xpu_kernels."""

from mamba_ops.registry import Backend

sycl = Backend("sycl", devices=("xpu",), requires="vllm_xpu_kernels._xpu_C", install="vllm_xpu_kernels", priority=30)
