"""What the C++ kernels share: how they are built, how they are called, and their header."""
