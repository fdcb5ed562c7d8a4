"""What Triton kernels share: device functions, copies into the layout that they read, launch tables."""
