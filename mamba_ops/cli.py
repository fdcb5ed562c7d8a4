"""The command `mamba-ops`: backends here and why not the others, the ops, a demo, a model compared or audited."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    if (missing := str(error.name).partition(".")[0]) not in ("typer", "rich"):
        raise
    print(f"mamba-ops needs {missing}, which is not installed; pip install 'mamba-ops[cli]'", file=sys.stderr)
    sys.exit(2)

import torch

from mamba_ops.audit.cli import audit_command
from mamba_ops.cold_start.commands import tune_command, warm_up_command
from mamba_ops.options import Config, configured, fail, failing
from mamba_ops.registry import Backend, Op, RegistryError, backends, explain, ops
from mamba_ops.targets import TargetError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command."""
    app()


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
Layers = Annotated[int | None, typer.Option(min=1, help="Of a model with random weights.", show_default="2")]
TARGET_HELP = (
    "package.module:factory or file.py:factory, which returns (model, inputs); transformers:mamba2 or :FOLDER."
)


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
def show_backends(device: Device = None, backend: Config = None) -> None:
    """Say which backend runs which op here, and why not the others."""
    console = Console(highlight=False, markup=False)  # "[triton]" is an extra, not a style
    with configured(backend, device):
        _show_backends(console, [device] if device else _devices())
    if backend is not None:
        console.print(f"--backend {backend} is in force")


def _show_backends(console: Console, devices: list[torch.device]) -> None:
    order = backends()
    try:
        for where in devices:
            table = Table(title=f"On {where}", title_justify="left")
            table.add_column("op", no_wrap=True)
            for heading in [*(backend.name for backend in order), "runs on"]:
                table.add_column(heading)
            for op in ops().values():
                table.add_row(op.name, *(_answer(backend, op, where) for backend in order), _choice(op, where))
            console.print(table)
    except RegistryError as error:
        fail(error)
    console.print("Default order: " + ", ".join(f"{backend.name} {backend.priority}" for backend in order))
    asked = os.environ.get("MAMBA_OPS_BACKEND")
    console.print(f"MAMBA_OPS_BACKEND={asked} is in force" if asked else "MAMBA_OPS_BACKEND is not set")


def _answer(backend: Backend, op: Op[...], device: torch.device) -> str:
    """Return "yes", or why not."""
    if backend.name not in op.kernels:
        return "-"
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


@app.command("ops")
def show_ops(
    name: Annotated[str | None, typer.Argument(help="The op to show.", show_default="all of them")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As it is in docs/ops.md.")] = False,
) -> None:
    """Say what the ops compute, what their arguments are, and what each backend does not take."""
    from rich.markdown import Markdown

    from mamba_ops import ops_page

    if name is None:
        text = ops_page.page()
    elif name in ops():
        text = ops_page.section(ops()[name])
    else:
        fail(f"there is no op {name!r}; ops: {', '.join(sorted(ops()))}")
    if markdown:
        print(text, end="")
    else:
        Console().print(Markdown(text))


# -- demo and compare -------------------------------------------------------------------------------------------------


class _Steps:
    """Shows the steps of a long command with the seconds that each takes: as they run, or line by line in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Callable[[str], None]:
        if self._console.is_terminal:
            self._progress.start()
        return self._begin

    def __exit__(self, *exception: object) -> None:
        self._end()
        if self._console.is_terminal:
            self._progress.stop()

    def _begin(self, step: str) -> None:
        self._end()
        self._task = self._progress.add_task(escape(step), total=1)
        if not self._console.is_terminal:
            self._console.print(f"{step} ...", markup=False)

    def _end(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1)


@app.command("demo")
def run_demo(
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
        from mamba_ops import demo  # brings torch.compile, which takes seconds
        from mamba_ops.demo.show import show

        console = Console(highlight=False)
        with _Steps(console) as tell:
            report = demo.run_demo(
                demo.read_text(text),
                checkpoint=checkpoint,
                device=device or _devices()[0],
                swap_to=backend,
                layers=layers,
                cap=cap,
                tell=tell,
            )
    show(report, console)
    raise typer.Exit(1 if report.problems else 0)


@app.command("compare")
def compare_backends(
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
        from mamba_ops.compare import compare

        console = Console(highlight=False, markup=False)  # a refusal may hold brackets
        names = [name.strip() for name in backends.split(",") if name.strip()] if backends else None
        with configured(backend, device), _Steps(console) as tell:
            comparison = compare(target, names, device=device or _devices()[0], layers=layers, tell=tell)
    table = Table(title=f"{target} on {comparison.device}", title_justify="left")
    for heading in ("backend", "eager ms", "compiled ms", "differs by", "recompiles", "ops ran on"):
        table.add_column(heading, justify="left" if heading in ("backend", "ops ran on") else "right")
    for row in comparison.rows:
        if row.refusal:
            table.add_row(row.backend, "-", "-", "-", "-", f"refuses: {row.refusal}")
            continue
        ran = ", ".join(f"{name} ({count})" for name, count in row.kernel_calls.items()) or "none of ours"
        numbers = f"{row.eager_ms:.1f}", f"{row.compiled_ms:.1f}", f"{row.difference:.1e}", str(row.recompiles)
        table.add_row(row.backend, *numbers, ran)
    console.print(table)
    console.print(f"graphs for all of this: {comparison.graphs}; the largest output: {comparison.largest:.2g}")
    for problem in comparison.problems:
        console.print(f"FAILED: {problem}", style="bold red")
    raise typer.Exit(1 if comparison.problems else 0)


app.command("warm-up")(warm_up_command)
app.command("tune")(tune_command)
app.command("audit", context_settings={"ignore_unknown_options": True})(audit_command)
