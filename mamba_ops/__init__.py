"""Mamba-family kernels as torch.library ops: traced whole by torch.compile, several backends under one name."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if Path(__file__).with_name("registry").is_file():
    raise ImportError(
        "mamba_ops/registry is a text file in this checkout, where git should have made a symbolic link to registry/; "
        "run `git config core.symlinks true`, on Windows with developer mode on, and check mamba_ops/registry out again"
    )

from mamba_ops import backends as backends
from mamba_ops import functional as functional
from mamba_ops import registry as registry
from mamba_ops.config import BackendConfig as BackendConfig
from mamba_ops.ops import *  # noqa: F403  the ops, each under its name
from mamba_ops.registry import checking as checking
from mamba_ops.registry import configure as configure
from mamba_ops.registry import explain as explain
from mamba_ops.registry import no_jit as no_jit
from mamba_ops.registry import record_selections as record_selections
from mamba_ops.registry import use_backend as use_backend
from mamba_ops.warm_up import warm_up as warm_up

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mamba_ops.commands.compare.comparison import compare as compare
else:  # to type checkers no name that is not here exists

    def __getattr__(name: str) -> object:
        """Import what takes a moment when it is first asked for: `compare`, and modules."""
        if name == "compare":
            return import_module("mamba_ops.commands.compare.comparison").compare
        if name in ("audit", "testing", "training"):
            return import_module(f"mamba_ops.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
