"""`mamba-ops tune`: time an op's Triton kernels in other launch configurations."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mamba_ops.commands.options import Sizes, failing, read_dtypes, read_sizes


def tune(
    ops: Annotated[list[str], typer.Argument(help="Names of ops.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="The table's folder, for MAMBA_OPS_CONFIG_DIR.")],
    size: Sizes = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE[,STATES]")] = "bfloat16,float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, xpu, cuda:1", show_default="this machine's accelerator")
    ] = None,
) -> None:
    """Time an op's Triton kernels in other launch configurations, keep the fastest; go on where it was stopped."""
    console = Console(highlight=False, markup=False)
    with failing(ValueError, OSError):
        from mamba_ops.cold_start import arguments, tuning  # imports Triton

        where = arguments.device_of((), device)
        activation, state = read_dtypes(dtype)
        with arguments.shown(None) as progress:
            found = tuning.tune(
                ops, where, out, sizes=read_sizes(size), dtype=activation, state_dtype=state, progress=progress
            )
    for tuned in found:
        sizes = ", ".join(f"{name} {value}" for name, value in tuned.sizes.items())
        before = "did not run" if math.isinf(tuned.before_us) else f"{tuned.before_us:.1f} us"
        console.print(f"{tuned.op}, {sizes}: {before}, now {tuned.after_us:.1f} us: {dict(tuned.launches)}")
    if not found:
        console.print(f"all of it is in {out} already")
