"""Windows and macOS, as far as they can be shown here: what POSIX alone has is taken away, and the platform's name is
another. The real ones are in the hosted CI.
"""

from pathlib import Path

import pytest

from tests import fresh

pytest.importorskip("typer", reason="the commands need mamba-ops[cli]")

RUN = """
import importlib.metadata, os, signal, sys
sys.modules["triton"] = None  # neither has it
known = importlib.metadata.version
def version(name):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
import torch, torch._dynamo, click, rich.console, typer.testing  # they would look at the platform themselves

system = sys.argv[1]
sys.platform = system
only_linux = ["sched_getaffinity", "sched_setaffinity"]
only_posix = ["fork", "register_at_fork", "killpg", "getuid", "geteuid", "setsid", "getpgid"]
for name in only_linux + (only_posix if system == "win32" else []):
    if hasattr(os, name):
        delattr(os, name)
if system == "win32":
    for name in ("SIGKILL", "SIGALRM", "SIGUSR1", "alarm", "setitimer"):
        delattr(signal, name)
    sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))

import mamba_ops
from mamba_ops.commands.cli import app
from mamba_ops.registry import ops

ran = 0
for op in (op for op in ops().values() if not op.returns):
    sample = op.make_samples("cpu")[0]
    op(*sample.args, **sample.kwargs)
    ran += 1
print(ran, "ops ran")
for command in (["doctor"], ["backends"], ["ops"], ["audit", "--help"], ["warm-up", "--help"]):
    result = typer.testing.CliRunner().invoke(app, command)
    assert result.exit_code == 0, (command, result.output, result.exception)
    print(result.output)
"""


@pytest.mark.parametrize(
    ("system", "sentence"),
    [
        ("win32", "there is no Triton for Windows on PyPI: ops run on torch"),
        ("darwin", "on a Mac ops run on torch, on the CPU and on mps"),
    ],
)
def test_ops_and_commands_run_there(system: str, sentence: str):
    done = fresh.run(["-c", RUN, system], cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "ops ran" in done.stdout
    assert sentence in " ".join(done.stdout.split())
