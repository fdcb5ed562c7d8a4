"""`mamba-ops warm-up`: compile and load kernels before they are needed, and carry the caches to other machines."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from mamba_ops.commands.options import Sizes, failing, read_dtypes, read_sizes
from mamba_ops.commands.targets import TRANSFORMERS, load_target
from mamba_ops.registry import ops


def warm_up(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="A model, as for compare; or an op's name.")
    ] = None,
    size: Sizes = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE[,STATES]", help="As bfloat16,float32.")] = None,
    backend: Annotated[str | None, typer.Option(metavar="A,B", help="Names.", show_default="default order")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, xpu, cuda:1", show_default="this machine's accelerator")
    ] = None,
    training: Annotated[bool, typer.Option("--training", help="Warm up what training asks for, too.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="That compile.", show_default="one a core")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Show every op in every way in which it was called.")] = False,
    export: Annotated[Path | None, typer.Option(file_okay=False, help="Copy the caches there, afterwards.")] = None,
    bring: Annotated[
        Path | None,
        typer.Option(
            "--import", file_okay=False, help="Take the caches from there, beforehand. They are code: trust it."
        ),
    ] = None,
) -> None:
    """Compile and load every kernel that a model or an op can ask for; carry the caches to identical machines."""
    console = Console(highlight=False, markup=False)
    with failing(ValueError, OSError):
        from mamba_ops.cold_start import arguments, transfer  # imports Triton

        where = arguments.device_of((), device)
        if target is None and bring is None and export is None:
            raise ValueError("got nothing to warm up, expected a model or the name of an op")
        if bring is not None:
            console.print(f"Caches are code, which processes that load them run: whoever wrote {bring} is trusted.")
            console.print(f"{transfer.bring(bring, where)} files from {bring}")
        if target is not None:
            names = [name.strip() for name in backend.split(",")] if backend else None
            dtypes = None if dtype is None else [read_dtypes(dtype)]
            _show(console, _warm_up(target, where, dtypes, read_sizes(size), names, training, processes), rows)
        if export is not None:
            console.print(f"{transfer.export(export, where)} files to {export}")


def _warm_up(
    target: str, device: torch.device, dtypes: Any, sizes: Any, backends: Any, training: bool, processes: int | None
) -> Any:
    from mamba_ops.warm_up import warm_up

    with ExitStack() as stack:
        what: Any = target
        if target not in ops():
            what = load_target(target, device).model
            if target.startswith(TRANSFORMERS):
                from mamba_ops.compat.transformers import use_mamba_ops

                stack.enter_context(use_mamba_ops(what))
        options: dict[str, Any] = {"dtypes": dtypes, "sizes": sizes, "backends": backends}
        return warm_up(what, device=device, **options, training=training, processes=processes)


def _show(console: Console, report: Any, rows: bool) -> None:
    if rows:
        table = Table("op", "backend", "variant", "seconds", "cached")
        for row in report:
            table.add_row(row.op, row.backend, row.variant, f"{row.seconds:.2f}", "yes" if row.cached else "no")
        console.print(table)
    for kernel, count, seconds in report.slowest[:5]:
        console.print(f"{seconds:6.2f} s  {kernel}, {count} variants")
    for line in report.configurations:
        console.print(line)
    console.print(str(report))
