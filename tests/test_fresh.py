"""A program in a fork of a process with torch finds what it would find in one of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import fresh


def anew(arguments: list[object], **options: Any) -> "subprocess.CompletedProcess[str]":
    """What `fresh.run` stands for."""
    command, stdin = [sys.executable, *map(str, arguments)], subprocess.DEVNULL
    return subprocess.run(command, stdin=stdin, capture_output=True, text=True, **options)


FACTS = """
import os, sys, torch
print(__name__, sys.argv, os.getcwd(), os.environ["TEST_FRESH"], repr(sys.stdin.read()), torch.get_num_threads())
print(sorted({name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names))
print(sorted(name for name in sys.modules if name.startswith("torch.")))
print(sys.path, file=sys.stderr)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(FACTS)
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    return tmp_path / "program.py"


@pytest.mark.parametrize("how", ["script", *(pytest.param(how, marks=pytest.mark.slow) for how in ("-c", "-m"))])
def test_it_finds_what_a_new_process_finds(program: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_FRESH", "set")
    monkeypatch.setenv("PYTHONPATH", str(program.parent / "more"))
    arguments = {"-c": ["-c", FACTS, "a", "b"], "-m": ["-m", "program", "a"], "script": [program, "a"]}[how]
    done, expected = fresh.run(arguments, cwd=program.parent), anew(arguments, cwd=program.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, expected.stderr)


def test_programs_know_nothing_of_each_other() -> None:
    assert fresh.run(["-c", "import sys, mamba_ops; sys.x = 1; print(sys.x)"]).stdout == "1\n"
    assert (
        fresh.run(["-c", "import sys; print(hasattr(sys, 'x'), 'mamba_ops' in sys.modules)"]).stdout == "False False\n"
    )
    drawn = [fresh.run(["-c", "import torch; print(torch.initial_seed())"]).stdout for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_how_it_ends_is_told() -> None:
    assert fresh.run(["-c", "raise SystemExit(3)"]).returncode == 3
    assert fresh.run(["-c", "import os; os.abort()"]).returncode == -6
    warn = "import warnings; warnings.warn('no', RuntimeWarning)"
    failed = fresh.run([*fresh.STRICT, "-c", warn])
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "RuntimeWarning: no"
    assert fresh.run([*fresh.STRICT, "-W", "ignore:no:RuntimeWarning", "-c", warn]).returncode == 0
    late = "import atexit; atexit.register(print, 'at the end')"
    assert fresh.run(["-c", late]).stdout == "at the end\n"
