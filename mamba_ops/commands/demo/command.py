"""`mamba-ops demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mamba_ops.commands.options import Device, Layers, Steps, devices, failing
from mamba_ops.commands.targets import TargetError
from mamba_ops.registry import RegistryError


def demo(
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="What to read.", show_default="this project's README"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A Mamba-2 checkpoint.", show_default="random weights"),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="The backend to swap to.", show_default="the next in the default order")
    ] = None,
    layers: Layers = None,
    device: Device = None,
    cap: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="When to stop stock from compiling.")] = 60,
) -> None:
    """Transformers' own Mamba-2, stock against ours: compiled for three prompts; decoding while the backend changes."""
    with failing(TargetError, RegistryError):
        from mamba_ops.commands.demo import run  # --help does without it
        from mamba_ops.commands.demo.show import show

        console = Console(highlight=False)
        with Steps(console) as progress:
            report = run.run_demo(
                run.read_text(text),
                checkpoint=checkpoint,
                device=device or devices()[0],
                swap_to=backend,
                layers=layers,
                cap=cap,
                progress=progress,
            )
    show(report, console)
    raise typer.Exit(1 if report.problems else 0)
