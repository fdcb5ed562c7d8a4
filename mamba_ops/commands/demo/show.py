"""A demo's report on the terminal."""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from mamba_ops.commands.demo.prefill import Prefill
from mamba_ops.commands.demo.run import DemoReport


def show(report: DemoReport, console: Console) -> None:
    """Print a report: the machine, the prompts, the text written after one, the verdict."""
    console.print(f"{report.model}\ntorch {torch.__version__} on {report.device}", markup=False, soft_wrap=True)
    console.print(prefill_table(report.stock, report.ours))

    table = Table(
        "", *(run.name for run in report.decoding), title="Decoding with Transformers' own cache", title_justify="left"
    )
    table.add_row("graphs", *(str(run.graphs) for run in report.decoding))
    table.add_row("recompiles", *(str(run.recompiles) for run in report.decoding))
    table.add_row("tokens/s", *(f"{run.tokens_per_s:,.0f}" for run in report.decoding))
    calls = [", ".join(f"{b} ({n})" for b, n in run.kernel_calls.items()) for run in report.decoding]
    table.add_row("ops ran on", *(text or "-" for text in calls))
    stock = report.decoding[0].tokens
    same = [sum(a == b for a, b in zip(run.tokens, stock, strict=True)) for run in report.decoding]
    table.add_row("as stock's", *(f"{n} of {len(stock)} tokens" for n in same))
    console.print(table)

    for problem in report.problems:
        console.print(f"FAILED: {problem}", style="bold red", markup=False)
    if not report.problems:
        before, after = report.decoding[-1].kernel_calls
        verdict = f"OK: one graph for all prompts, {compile_ratio(report.stock, report.ours)}"
        verdict += f"; {before} and {after} under one compiled decoder, nothing recompiled, the text unchanged"
        console.print(verdict, style="bold green", soft_wrap=True)


def prefill_table(stock: Prefill, ours: Prefill) -> Table:
    """Return the table of prompts read without a cache."""
    table = Table("", title="Prompts, torch.compile(model, dynamic=True)", title_justify="left")
    table.add_column("stock", justify="right")
    table.add_column("ours", justify="right")

    def row(name: str, cell: Callable[[Prefill], str]) -> None:
        table.add_row(name, cell(stock), cell(ours))

    row("eager tokens/s", lambda side: _number(side.eager_tokens_per_s))
    for i, length in enumerate(ours.lengths):
        row(f"compiling, {length} tokens", lambda side, i=i: _compiling(side, i))  # type: ignore[misc]
    row("compiling, in all", lambda side: f"{_at_least(side)}{side.total_compile_s:.1f} s")
    row("graphs", lambda side: f"{side.graphs}{_so_far(side)}")
    row("compiles", lambda side: f"{side.compiles}{_so_far(side)}")
    row("compiled tokens/s", lambda side: _number(side.compiled_tokens_per_s))
    row("logits differ by", lambda side: f"{side.difference:.1e}" if side is ours or side.compile_s else "-")
    return table


def compile_ratio(stock: Prefill, ours: Prefill) -> str:
    """Return how much less ours compiles, in words that follow a comma."""
    ratio = stock.total_compile_s / ours.total_compile_s if ours.total_compile_s else float("inf")
    if stock.stopped_after_s is not None and ratio < 1:
        return "and stock was stopped too early to compare"
    return f"compiled in {_at_least(stock)}{ratio:.1f}x less time than stock"


def _compiling(side: Prefill, i: int) -> str:
    if i < len(side.compile_s):
        return f"{side.compile_s[i]:.1f} s"
    return f"stopped after {side.stopped_after_s:.0f} s" if i == len(side.compile_s) else "not reached"


def _at_least(side: Prefill) -> str:
    return "" if side.stopped_after_s is None else "more than "


def _so_far(side: Prefill) -> str:
    return "" if side.stopped_after_s is None else " so far"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
