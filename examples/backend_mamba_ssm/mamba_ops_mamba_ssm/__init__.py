"""Backends for mamba-ops on the CUDA kernels of mamba_ssm and causal_conv1d; `backends` is the entry point."""
