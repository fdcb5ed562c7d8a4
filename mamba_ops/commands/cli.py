"""The entry point of the command `mamba-ops`: its subcommands, and its version."""

import sys
from typing import Annotated

try:
    import rich as rich  # the subcommands print with it
    import typer
except ModuleNotFoundError as error:
    if (missing := str(error.name).partition(".")[0]) not in ("typer", "rich"):
        raise
    print(f"mamba-ops needs {missing}, which is not installed; pip install 'mamba-ops[cli]'", file=sys.stderr)
    sys.exit(2)

import mamba_ops
from mamba_ops.commands.audit.command import audit
from mamba_ops.commands.backends import backends
from mamba_ops.commands.bench.command import bench
from mamba_ops.commands.compare.command import compare
from mamba_ops.commands.demo.command import demo
from mamba_ops.commands.doctor.command import doctor
from mamba_ops.commands.ops import ops
from mamba_ops.commands.tune import tune
from mamba_ops.commands.warm_up import warm_up

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for command in (doctor, backends, ops, demo, compare, warm_up, tune, bench):
    app.command()(command)  # the name is the function's, with dashes
app.command(context_settings={"ignore_unknown_options": True})(audit)


def main() -> None:
    """Run the command."""
    app(prog_name="mamba-ops")  # `python -m mamba_ops` too


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mamba-ops {mamba_ops.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mamba-family kernels as torch.library ops, with several backends under one name."""
