"""The demo: a small Mamba-2-like model reads a real text, and the backend changes under its one compiled graph.

`run_demo` returns data, `show` prints it. What measures here is what the benchmarks measure with.
"""

from mamba_ops.demo.model import Decoder as Decoder
from mamba_ops.demo.run import DemoError as DemoError
from mamba_ops.demo.run import DemoReport as DemoReport
from mamba_ops.demo.run import Run as Run
from mamba_ops.demo.run import read_text as read_text
from mamba_ops.demo.run import run_demo as run_demo
from mamba_ops.demo.show import show as show
