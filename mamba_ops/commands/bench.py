"""`mamba-ops bench`: time the backends of each op on this machine, and write down the fastest ones."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mamba_ops.cold_start import arguments, choosing
from mamba_ops.commands.options import Device, Sizes, devices, failing, read_dtypes, read_sizes


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Names of ops.", show_default="all that have a choice")
    ] = None,
    choose: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write the choices here, for BackendConfig.load.")
    ] = None,
    size: Sizes = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE[,STATES]")] = "bfloat16,float32",
    device: Device = None,
) -> None:
    """Time every backend of each op at several sizes; nothing changes until the file that is written is loaded."""
    console = Console(highlight=False, markup=False)
    where: torch.device = device or devices()[0]
    with failing(ValueError, OSError):
        if choose is not None and not choose.parent.is_dir():
            raise ValueError(f"--choose: got {choose}, expected a file in a folder that exists")
        activation, state = read_dtypes(dtype)
        chosen = choosing.ops_to_choose_for(ops or (), where)
        with arguments.shown(None) as progress:
            found = choosing.choose(
                chosen, where, sizes=read_sizes(size), dtype=activation, state_dtype=state, progress=progress
            )
        if choose is not None:
            choosing.write(choose, found, where)
    table = Table(title=f"Microseconds on {where}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("op", "size", "fastest", "all"):
        table.add_column(heading)
    for choice in found:
        for number, (size_class, times) in enumerate(choice.us.items()):
            shown = ", ".join(f"{n} {t:.1f}" if isinstance(t, float) else f"{n} refuses" for n, t in times.items())
            table.add_row("" if number else choice.op, size_class, "" if number else choice.order[0], shown)
    if found:
        console.print(table)
    else:
        console.print(f"On {where} no op has two backends to choose from.")
    if choose is not None:
        console.print(f"{choose}: put it in force with mamba_ops.configure(BackendConfig.load({str(choose)!r}))")
