"""The demo: Transformers' own Mamba-2 compiles into one graph through our ops, and the backend changes under it.

`run_demo` returns data, `mamba_ops.demo.show` prints it. What measures here is what the benchmarks measure with.
"""

from mamba_ops.demo.prefill import MeasurementError as MeasurementError
from mamba_ops.demo.prefill import Prefill as Prefill
from mamba_ops.demo.run import DemoReport as DemoReport
from mamba_ops.demo.run import read_text as read_text
from mamba_ops.demo.run import run_demo as run_demo
