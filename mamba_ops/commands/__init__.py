"""The command `mamba-ops`, a file or a folder for each of its subcommands. It needs the extra `mamba-ops[cli]`."""
