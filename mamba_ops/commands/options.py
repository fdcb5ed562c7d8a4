"""Shared by the subcommands: options, the exit on wrong usage, and the display of progress."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from mamba_ops.config import BackendConfig
from mamba_ops.registry import RegistryError, configure

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# -- options ----------------------------------------------------------------------------------------------------------


def devices() -> list[torch.device]:
    """Return the accelerator of this machine, if any, and its CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [*([accelerator] if accelerator else []), torch.device("cpu")]


def _device(name: str) -> torch.device:
    """Read a device's name, and check that the device is present."""
    present = {device.type for device in devices()}
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"{name!r} is no device; devices here: {', '.join(sorted(present))}") from None
    if device.type not in present or (device.index or 0) >= torch.get_device_module(device).device_count():
        raise typer.BadParameter(f"there is no {name} here; devices here: {', '.join(sorted(present))}")
    return device


Config = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="CONFIG",
        help="As MAMBA_OPS_BACKEND, and before it: flashinfer:triton, op=torch, stochastic_rounding=true.",
        show_default="MAMBA_OPS_BACKEND",
    ),
]
Device = Annotated[
    torch.device | None, typer.Option("--device", parser=_device, metavar="DEVICE", help="cpu, cuda, xpu, cuda:1")
]
Layers = Annotated[int | None, typer.Option(min=1, help="Of a model with random weights.", show_default="2")]
Sizes = Annotated[list[str] | None, typer.Option("--size", metavar="NAME=N", help="A static size, as dstate=128.")]
TARGET_HELP = (
    "package.module:factory or file.py:factory, which returns (model, inputs); transformers:mamba2 or :FOLDER."
)


def read_sizes(items: list[str] | None) -> dict[str, int]:
    """Read the values of --size.

    Raises:
        ValueError: one is not of the form NAME=N.
    """
    sizes = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not value.isdigit():
            raise ValueError(f"--size: got {item!r}, expected a name and a number, as dstate=128")
        sizes[name] = int(value)
    return sizes


def read_dtypes(text: str) -> tuple[torch.dtype, torch.dtype]:
    """Read the value of --dtype: the dtype of activations, then that of states, float32 if it is not given.

    Raises:
        ValueError: one is not a dtype that kernels are compiled for.
    """
    activation, state = [*text.split(","), "float32"][:2]
    for name in (activation, state):
        if name not in _DTYPES:
            raise ValueError(f"--dtype: got {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[activation], _DTYPES[state]


@contextmanager
def configured(backend: str | None, device: torch.device | str | None) -> Iterator[None]:
    """Within the block, the configuration of --backend is in force."""
    if backend is None:
        yield
        return
    try:
        configure(BackendConfig.from_string(backend, device=device))
    except RegistryError as error:
        fail(f"--backend: {error}")
    try:
        yield
    finally:
        configure(None)


# -- how a subcommand ends --------------------------------------------------------------------------------------------


def fail(sentence: object) -> NoReturn:
    """Print why, and end with status 2, as on any wrong usage."""
    Console(stderr=True).print(f"mamba-ops: {sentence}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def failing(*errors: type[Exception]) -> Iterator[None]:
    """End with `fail` on one of these errors; its cause, an error in the user's code, is printed first."""
    try:
        yield
    except errors as error:
        if error.__cause__ is not None:
            shown = error.__cause__.__traceback__
            traceback.print_exception(
                error.__cause__.with_traceback(shown and shown.tb_next)
            )  # without the frame of this file
        fail(error)


# -- progress ---------------------------------------------------------------------------------------------------------


class Steps:
    """Shows the steps of a long command, each with the seconds it takes on a terminal, line by line in a log."""

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
