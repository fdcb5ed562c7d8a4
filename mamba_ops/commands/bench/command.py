"""`mamba-ops bench`: our ops on this machine, beside whatever peers are installed."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mamba_ops.cold_start import arguments, choosing
from mamba_ops.commands.options import Device, Sizes, devices, failing, read_dtypes, read_sizes
from mamba_ops.registry import backends as all_backends
from mamba_ops.registry import ops as all_ops
from mamba_ops.registry.errors import unknown

DTYPES = "bfloat16,float32"


def bench(
    ops: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of ops.", show_default="all that have a case")
    ] = None,
    backends: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of backends.", show_default="all that run here")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(file_okay=False, metavar="FOLDER", help="Write bench.json, .txt, .md and .png there.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Begin nothing new after so many.")
    ] = None,
    host: Annotated[bool, typer.Option("--host", help="What eager calls cost the host, too.")] = False,
    choose: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Find the fastest backend of each op; write it for BackendConfig.load."),
    ] = None,
    size: Sizes = None,
    dtype: Annotated[str, typer.Option(metavar="DTYPE[,STATES]", help="Of --choose.")] = DTYPES,
    device: Device = None,
) -> None:
    """Time every op on every backend, and the peers that are installed, beside what the device could do at best.

    What gives wrong numbers is reported, and not timed.
    """
    console = Console(highlight=False, markup=False)
    where: torch.device = device or devices()[0]
    with failing(ValueError, OSError):
        chosen = _names("backends", backends, [backend.name for backend in all_backends()])  # loads other packages' ops
        named = _names("ops", ops, [*all_ops()])
        if choose is not None:
            if chosen or output or host or limit is not None:
                raise ValueError("--choose: got --backends, --output, --host or --limit with it, expected it alone")
            _choose(console, choose, named, where, read_sizes(size), dtype)
            return
        if size or dtype != DTYPES:
            raise ValueError("--size and --dtype: expected them with --choose; figures are of the sizes of models")
        if host and where.type == "cpu":
            raise ValueError(f"--host: got the device {where}, expected a GPU: what is timed is launching on one")
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError(f"--output: got {output}, expected a folder in one that exists")
        _measure(console, named, chosen, where, output, limit, host)


def _names(option: str, given: str | None, known: list[str]) -> list[str]:
    """Read a list of names.

    Raises:
        ValueError: one is not known.
    """
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise unknown(option.rstrip("s"), name, known)
    return names


def _measure(
    console: Console,
    ops: list[str],
    backends: list[str],
    where: torch.device,
    output: Path | None,
    limit: float | None,
    host: bool,
) -> None:
    from mamba_ops.commands.bench import host as of_host
    from mamba_ops.commands.bench import run, show

    builds = run.cases_of(where)
    if strays := [op for op in ops if op not in builds]:
        raise ValueError(f"--ops: got {strays[0]}, expected one that has a case: {', '.join(builds)}")
    builds = {op: found for op, found in builds.items() if not ops or op in ops}
    late = run.deadline(limit)
    with arguments.shown(None) as progress:
        found = run.run(builds, where, names=backends, late=late, progress=progress)
        found["command"] = " ".join(["mamba-ops", *sys.argv[1:]])
        found["without_case"] = sorted(all_ops().keys() - run.cases_of(where).keys())
        timed = [n for n, op in all_ops().items() if op.host_call and (not ops or n in ops)] if host else []
        found["host"] = of_host.run(timed, where, late, progress) if found["finished"] else []
        found["finished"] &= len(found["host"]) == len(timed)
    for line in show.lines(found):
        console.print(line, soft_wrap=isinstance(line, str))
    if output is not None:
        written = show.write(found, output)
        console.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True)
        if not any(path.suffix == ".png" for path in written):
            console.print("No plot: matplotlib is not installed; pip install 'mamba-ops[plot]'", soft_wrap=True)
    if any(each["status"] == "wrong" for row in found["rows"] for each in row["contestants"] if each["kind"] != "peer"):
        console.print(
            "FAILED: a backend gave wrong numbers; please report it, with bench.json of --output", style="red"
        )
        raise typer.Exit(1)


def _choose(
    console: Console, path: Path, named: list[str], where: torch.device, sizes: dict[str, int], dtype: str
) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--choose: got {path}, expected a file in a folder that exists")
    choosing.require_writable(path)
    activation, state = read_dtypes(dtype)
    ops = choosing.ops_to_choose_for(named, where)
    with arguments.shown(None) as progress:
        found = choosing.choose(ops, where, sizes=sizes, dtype=activation, state_dtype=state, progress=progress)
    choosing.write(path, found, where)
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
    console.print(f"{path}: put it in force with mamba_ops.configure(BackendConfig.load({str(path)!r}))")
