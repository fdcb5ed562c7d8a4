"""The command `mamba-ops`: which backends run here and why not the others, and a demo."""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    if (missing := str(error.name).partition(".")[0]) not in ("typer", "rich"):
        raise
    print(f"mamba-ops needs {missing}, which is not installed; pip install 'mamba-ops[cli]'", file=sys.stderr)
    sys.exit(2)

import torch

from mamba_ops.registry import Backend, Op, RegistryError, backends, explain, ops

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command."""
    app()


def _fail(sentence: object) -> NoReturn:
    """End the command as it ends for any wrong usage."""
    Console(stderr=True).print(f"mamba-ops: {sentence}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


def _devices() -> list[torch.device]:
    """Return the accelerator of this machine, if any, and its CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [*([accelerator] if accelerator else []), torch.device("cpu")]


def _device(name: str) -> torch.device:
    """Read a device's name, and see that it is here."""
    here = {device.type for device in _devices()}
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is no device; devices here: {', '.join(sorted(here))}") from None
    if device.type not in here or (device.index or 0) >= torch.get_device_module(device).device_count():
        raise typer.BadParameter(f"there is no {name} here; devices here: {', '.join(sorted(here))}")
    return device


Device = Annotated[
    torch.device | None, typer.Option("--device", parser=_device, metavar="DEVICE", help="cpu, cuda, xpu, cuda:1")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"mamba-ops {version('mamba-ops')}")
        except PackageNotFoundError:
            print("mamba-ops, from a checkout that is not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mamba-family kernels as torch.library ops, with several backends under one name."""


@app.command("backends")
def show_backends(device: Device = None) -> None:
    """Say which backend runs which op here, and why not the others."""
    console = Console(highlight=False, markup=False)  # "[triton]" is an extra, not a style
    order = backends()
    try:
        for where in [device] if device else _devices():
            table = Table(title=f"On {where}", title_justify="left")
            table.add_column("op", no_wrap=True)
            for heading in [*(backend.name for backend in order), "runs on"]:
                table.add_column(heading)
            for op in ops().values():
                table.add_row(op.name, *(_answer(backend, op, where) for backend in order), _choice(op, where))
            console.print(table)
    except RegistryError as error:
        _fail(error)
    console.print("Default order: " + ", ".join(f"{backend.name} {backend.priority}" for backend in order))
    asked = os.environ.get("MAMBA_OPS_BACKEND")
    console.print(f"MAMBA_OPS_BACKEND={asked} is in force" if asked else "MAMBA_OPS_BACKEND is not set")


def _answer(backend: Backend, op: Op[...], device: torch.device) -> str:
    """Return "yes", or why not."""
    if backend.name not in op.kernels:
        return "has no kernel"
    reason = backend.why_unusable(device.type)
    if reason and backend.why_unusable(device.type, by_name=True) is None:
        return "if asked for by name"
    return reason or "yes"


def _choice(op: Op[...], device: torch.device) -> str:
    """Return where the op's base call would run, and who asked for that if anybody did."""
    sample = op.make_samples(device)[0]
    explanation = explain(op, *sample.args, **sample.kwargs)
    who = f" ({explanation.bound_by})" if explanation.bound_by else ""
    return f"{explanation.backend or 'nothing'}{who}"


@app.command("demo")
def run_demo(
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="What to read.", show_default="this project's README"),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="The backend to swap to.", show_default="the next in the default order")
    ] = None,
    device: Device = None,
    tokens: Annotated[int, typer.Option(min=4, help="How many bytes of each stream to read, at most.")] = 256,
) -> None:
    """Read a text eagerly, compiled, and compiled with another backend from the middle on: one graph, equal results."""
    from mamba_ops import demo  # brings torch.compile, which takes seconds

    console = Console(highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            report = demo.run_demo(
                demo.read_text(text),
                device=device or _devices()[0],
                swap_to=backend,
                tokens=tokens,
                track=lambda steps, name: progress.track(steps, description=name),
            )
    except (demo.DemoError, RegistryError) as error:
        _fail(error)
    demo.show(report, console)
    raise typer.Exit(1 if report.problems else 0)
