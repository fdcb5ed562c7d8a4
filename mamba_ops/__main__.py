"""`python -m mamba_ops` is the command `mamba-ops`."""

from mamba_ops.commands.cli import main

main()
