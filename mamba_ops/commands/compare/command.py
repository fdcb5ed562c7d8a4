"""`mamba-ops compare`."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mamba_ops.commands.options import TARGET_HELP, Config, Device, Layers, Steps, configured, devices, failing
from mamba_ops.commands.targets import TargetError
from mamba_ops.registry import RegistryError


def compare(
    target: Annotated[str, typer.Argument(metavar="TARGET", help=TARGET_HELP)],
    backends: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names, the first to be compared with.", show_default="all here")
    ] = None,
    backend: Config = None,
    layers: Layers = None,
    device: Device = None,
) -> None:
    """Run a model of yours on one backend after the other: time, largest difference, refusals, recompiles."""
    with failing(TargetError, RegistryError):
        from mamba_ops.commands.compare import comparison  # --help does without it

        console = Console(highlight=False, markup=False)  # refusals may contain brackets
        names = [name.strip() for name in backends.split(",") if name.strip()] if backends else None
        with configured(backend, device), Steps(console) as progress:
            found = comparison.compare(target, names, device=device or devices()[0], layers=layers, progress=progress)
    table = Table(title=f"{target} on {found.device}", title_justify="left")
    for heading in ("backend", "eager ms", "compiled ms", "differs by", "recompiles", "ops ran on"):
        table.add_column(heading, justify="left" if heading in ("backend", "ops ran on") else "right")
    for row in found.rows:
        if row.refusal:
            table.add_row(row.backend, "-", "-", "-", "-", f"refuses: {row.refusal}")
            continue
        ran = ", ".join(f"{name} ({count})" for name, count in row.kernel_calls.items()) or "none of ours"
        numbers = f"{row.eager_ms:.1f}", f"{row.compiled_ms:.1f}", f"{row.difference:.1e}", str(row.recompiles)
        table.add_row(row.backend, *numbers, ran)
    console.print(table)
    console.print(f"graphs for all of this: {found.graphs}; the largest output: {found.largest:.2g}")
    for problem in found.problems:
        console.print(f"FAILED: {problem}", style="bold red")
    raise typer.Exit(1 if found.problems else 0)
