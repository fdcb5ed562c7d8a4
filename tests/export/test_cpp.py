"""Packages in a C++ program that has no Python: examples/run_package.cpp, built as docs/export.md says."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.programs import FLOAT32, cached_program, decomposed, layer_program
from tests.pages import ROOT, blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    # Inductor calls it where it compiles what gated delta rules are decomposed to
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]

CASES = [("mamba", "call"), ("mamba2", "prefill"), ("mamba2", "step"), ("gdn", "call")]


class Runner:
    """The program, built in a folder; it runs in an empty environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.folder / "examples").symlink_to(ROOT / "examples")
        [(_, build)] = [b for b in blocks(ROOT / "docs" / "export.md", "sh") if "g++" in b[1]]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        subprocess.run(["sh", "-ec", build], cwd=folder, env={**os.environ, "PATH": path}, check=True)

    def package(self, program: torch.export.ExportedProgram) -> None:
        torch._inductor.aoti_compile_and_package(program, package_path=str(self.folder / "model.pt2"))

    def run(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        torch.save(list(inputs), self.folder / "inputs.pt")
        command = [str(self.folder / "run_package"), "model.pt2", "inputs.pt", "outputs.pt"]
        done = subprocess.run(command, cwd=self.folder, env={}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return torch.load(self.folder / "outputs.pt")


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runner"))


@pytest.mark.parametrize(("kind", "what"), CASES)
def test_decomposed_layers_run(kind: str, what: str, runner: Runner, measure: Any) -> None:
    program = layer_program(kind) if what == "call" else cached_program(kind, is_step=what == "step")
    runner.package(decomposed(program.export()))
    assert measure(program, runner.run) <= FLOAT32


def test_a_package_with_ops_says_which_one_is_missing(runner: Runner) -> None:
    program = layer_program("mamba2")
    runner.package(program.export())
    with pytest.raises(RuntimeError, match="Could not find schema for mamba_ops::causal_conv1d"):
        runner.run(*program.calls[0])
