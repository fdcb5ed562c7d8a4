"""The table of `python -m compile_tests`: what is right passes, and each check can fail."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the table needs mamba-ops[cli]")

from compile_tests.__main__ import CHECKS, Subject, check
from compile_tests.planted import breaks, guards, ops
from tests.conftest import ACCELERATOR

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("no_grad")


def calls(*sizes: int) -> Any:
    return [((torch.randn(size, 8),), {}) for size in sizes]


class Drifts(breaks.Base):
    """Compiled once, it goes on with the number of then."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.proj(x)
        return y * (2 if torch.compiler.is_compiling() else 1)


def test_what_is_right_passes() -> None:
    found = check(Subject("right", breaks.Quiet(), calls(4, 5, 7)), CPU, here=True, copies=False)
    assert found == dict(zip(CHECKS, ("-", "yes", "yes", "none", "-", "nothing"), strict=True))


@pytest.mark.parametrize(
    ("model", "sizes", "failed"),
    [
        (breaks.Branch, (4, 5), "one graph"),
        (guards.DecidesBySize, (4, 12), "recompiles"),
        (Drifts, (4, 5), "compiled = eager"),
        pytest.param(ops.CacheInPlaceOnView, (4,), "copies", marks=pytest.mark.slow),
    ],
)
def test_each_check_can_fail(model: Any, sizes: tuple[int, ...], failed: str) -> None:
    found = check(Subject("wrong", model(), calls(*sizes)), CPU, here=True, copies=failed == "copies")
    assert found[failed].startswith("NO"), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "device", ["cpu", *(d for d in ("cuda", "xpu") if ACCELERATOR is None or ACCELERATOR.type != d)]
)
def test_the_table(device: str) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "compile_tests", "--device", device]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layers.Mamba2, plan" in done.stdout
