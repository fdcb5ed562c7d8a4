"""Compiling and loading kernels before the first call, and showing that no later call does it."""
