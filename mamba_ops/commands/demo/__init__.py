"""The demo: Transformers' own Mamba-2 compiles into one graph through our ops, and the backend changes under it.

`run.run_demo` returns data, `show.show` prints it. The benchmarks use its measuring code.
"""
