"""The commands `mamba-ops warm-up` and `mamba-ops tune`; what takes long to import is imported when they run."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from mamba_ops.options import failing

Sizes = Annotated[list[str] | None, typer.Option("--size", metavar="NAME=N", help="A static size, as dstate=128.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, xpu, cuda:1", show_default="the accelerator")]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def warm_up_command(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help="A model, as for compare; or an op's name.")
    ] = None,
    size: Sizes = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE[,STATES]", help="As bfloat16,float32.")] = None,
    backend: Annotated[str | None, typer.Option(metavar="A,B", help="Names.", show_default="default order")] = None,
    device: Device = None,
    processes: Annotated[int | None, typer.Option(min=1, help="That compile.", show_default="one a core")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Show every op in every way in which it was called.")] = False,
    export: Annotated[Path | None, typer.Option(file_okay=False, help="Copy the caches there, afterwards.")] = None,
    bring: Annotated[
        Path | None, typer.Option("--import", file_okay=False, help="Take the caches from there, beforehand.")
    ] = None,
) -> None:
    """Compile and load every kernel that a model or an op may launch; copy the caches to identical machines."""
    console = Console(highlight=False, markup=False)
    with failing(ValueError):
        from mamba_ops.cold_start import arguments, transfer

        where = arguments.device_of((), device)
        if target is None and bring is None and export is None:
            raise ValueError("got nothing to warm up, expected a model or the name of an op")
        if bring is not None:
            console.print(f"{transfer.bring(bring, where)} files from {bring}")
        if target is not None:
            _warm_up(console, target, _sizes(size), _pair(dtype), backend, where, processes, rows)
        if export is not None:
            console.print(f"{transfer.export(export, where)} files to {export}")


def tune_command(
    ops: Annotated[list[str], typer.Argument(help="Names of ops.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="The table's folder, for MAMBA_OPS_CONFIG_DIR.")],
    size: Sizes = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE[,STATES]")] = "bfloat16,float32",
    device: Device = None,
) -> None:
    """Time an op's Triton kernels in other launch configurations, keep the fastest; go on where it was stopped."""
    console = Console(highlight=False, markup=False)
    with failing(ValueError):
        from mamba_ops.cold_start import arguments, tuning

        where, pair = arguments.device_of((), device), _pair(dtype)
        with arguments.shown(None) as progress:
            dtypes = {"dtype": pair[0], "state_dtype": pair[1]}
            found = tuning.tune(ops, where, out, sizes=_sizes(size), **dtypes, progress=progress)
    for tuned in found:
        sizes = ", ".join(f"{name} {value}" for name, value in tuned.sizes.items())
        console.print(
            f"{tuned.op}, {sizes}: {tuned.before_us:.1f} us, now {tuned.after_us:.1f}: {dict(tuned.launches)}"
        )
    if not found:
        console.print(f"all of it is in {out} already")


def _warm_up(
    console: Console,
    target: str,
    sizes: dict[str, int],
    pair: Any,
    backend: str | None,
    where: torch.device,
    processes: int | None,
    rows: bool,
) -> None:
    from mamba_ops.registry import ops
    from mamba_ops.targets import load_target
    from mamba_ops.warm_up import warm_up

    what: Any = target
    bound = None
    if target not in ops():
        what = load_target(target, where).model
        if target.startswith("transformers:"):
            from mamba_ops.compat.transformers import use_mamba_ops

            bound = use_mamba_ops(what)
    names = [name.strip() for name in backend.split(",")] if backend else None
    pairs = None if pair is None else [pair]
    report = warm_up(what, device=where, dtypes=pairs, sizes=sizes, backends=names, processes=processes)
    if bound is not None:
        bound.undo()
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


def _sizes(given: list[str] | None) -> dict[str, int]:
    sizes = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not equals or not value.isdigit():
            raise ValueError(f"--size: got {item!r}, expected a name and a number, as dstate=128")
        sizes[name] = int(value)
    return sizes


def _pair(given: str | None) -> Any:
    if given is None:
        return None
    names = [*given.split(","), "float32"][:2]
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    return tuple(DTYPES[name] for name in names)
