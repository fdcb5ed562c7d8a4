"""docs/add_an_op.md, followed to the letter: its files in a new folder, and its test in a fresh process."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests import fresh
from tests.conftest import ACCELERATOR
from tests.pages import ROOT, blocks, write_files

pytest.importorskip("triton", reason="the page's kernel is Triton's")

PAGE = ROOT / "docs" / "add_an_op.md"
FILES = [
    "gated_recurrence/__init__.py",
    "gated_recurrence/kernel.py",
    "gated_recurrence/op.py",
    "gated_recurrence/training.py",
    "pyproject.toml",
    "tests/test_gated_recurrence.py",
]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with the page's package."""
    written = write_files(PAGE, tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in written) == FILES
    return tmp_path


def run_its_test(package: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the command of the page, with this checkout's mamba_ops."""
    [(_, line)] = blocks(PAGE, "sh")
    variable, python, *command = line.split()
    name, _, value = variable.partition("=")
    assert python == "python"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if ACCELERATOR is None:  # as the page says
        environment[name] = value
    return fresh.run([*command, *options], cwd=package, env=environment, is_warm=True)


def test_the_packages_own_test_passes_and_prints_what_the_page_shows(package: Path) -> None:
    done = run_its_test(package)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    [(_, table)] = blocks(PAGE, "text")
    assert table.replace(" on cpu: ", f" on {(ACCELERATOR or torch.device('cpu')).type}: ") in done.stdout


def test_a_fault_in_its_kernel_fails_its_test(package: Path) -> None:
    kernel = package / "gated_recurrence" / "kernel.py"
    right = kernel.read_text()
    kernel.write_text(right.replace("h = a * h + b * x", "h = a * h + x"))
    assert kernel.read_text() != right
    done = run_its_test(package, "-k", "not bfloat16")
    assert done.returncode == 1
    assert "recurrences::gated_recurrence on triton, sample 'base': numbers are right: " in done.stdout
