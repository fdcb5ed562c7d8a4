"""What commands share: how they end for what the user can put right, and the option --backend."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

from mamba_ops.config import BackendConfig
from mamba_ops.registry import RegistryError, configure

Config = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="CONFIG",
        help="As MAMBA_OPS_BACKEND, and before it: flashinfer:triton, op=torch, stochastic_rounding=true.",
        show_default="MAMBA_OPS_BACKEND",
    ),
]


def fail(sentence: object) -> NoReturn:
    """End the command as it ends for any wrong usage."""
    Console(stderr=True).print(f"mamba-ops: {sentence}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def failing(*errors: type[Exception]) -> Iterator[None]:
    """End the command with a sentence for what the user can put right; an error in their code is shown before it."""
    try:
        yield
    except errors as error:
        if error.__cause__ is not None:
            shown = error.__cause__.__traceback__
            traceback.print_exception(error.__cause__.with_traceback(shown and shown.tb_next))  # not our frame
        fail(error)


@contextmanager
def configured(backend: str | None, device: torch.device | str | None) -> Iterator[None]:
    """Within the block, what --backend says is in force."""
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
