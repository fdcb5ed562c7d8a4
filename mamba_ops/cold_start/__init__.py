"""What is slow once: compiling and loading kernels. Done before the first call, and seen to stay done."""
