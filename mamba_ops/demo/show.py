"""A demo's report on the terminal."""

import torch
from rich.console import Console
from rich.table import Table

from mamba_ops.demo.run import DemoReport


def show(report: DemoReport, console: Console) -> None:
    """Print a report: the machine, the three runs, the boundary, the verdict."""
    runs, boundary = report.runs, report.boundary
    console.print(f"torch {torch.__version__} on {report.device}; {report.streams} streams of {report.steps} bytes")
    table = Table("", *(run.name for run in runs))
    table.add_row("graphs", *(str(run.graphs) for run in runs))
    table.add_row("recompiles", *(str(run.recompiles) for run in runs))
    table.add_row("first step", *(f"{run.first_step_s:.2f} s" for run in runs))
    table.add_row("tokens/s", *(f"{run.tokens_per_s:,.0f}" for run in runs))
    table.add_row("kernels ran on", *(", ".join(f"{b} ({n})" for b, n in run.kernel_calls.items()) for run in runs))
    table.add_row("logits differ by", *(f"{run.difference:.1e}" for run in runs))
    table.add_row("same next bytes", *(f"{run.same_predictions:.1%}" for run in runs))
    console.print(table)
    console.print(f"{boundary.op}, its kernel doing nothing: {boundary.front_us:.1f} us a call,")
    console.print(f"a bare torch.library op of that schema {boundary.bare_us:.1f} us: ratio {boundary.ratio:.2f}")
    for problem in report.problems:
        console.print(f"FAILED: {problem}", style="bold red", markup=False)
    if not report.problems:
        before, after = runs[-1].kernel_calls
        console.print(
            f"OK: one graph, no recompile, {before} and {after} under it, the same results", style="bold green"
        )
