"""Exported programs of every op and layer: saved, loaded, decomposed, packaged, and called with other lengths."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mamba_ops
from mamba_ops import export, record_selections, use_backend
from mamba_ops.registry import Op, ops
from tests.export.programs import (
    FLOAT32,
    LAYERS,
    cached_program,
    decomposed,
    layer_program,
    op_cases,
    op_program,
    tensors_of,
)
from tests.harness import OPS

CASES = [pytest.param(op, pattern, id=f"{op.name}-{pattern}") for op, pattern in op_cases()]
READS_LENGTHS = {"selective_state_update", "gated_delta_rule_update", "kda_update", "mamba3_state_update"}
"""Ops whose reference reads the longest of packed rows on the host: they cannot be decomposed there."""


def packaged(program: torch.export.ExportedProgram, path: Path) -> Any:
    """The program, compiled by AOTInductor and loaded again."""
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))


def saved(program: torch.export.ExportedProgram, path: Path) -> torch.export.ExportedProgram:
    """The program, saved and loaded again."""
    torch.export.save(program, path)
    return torch.export.load(path)


def test_the_table_has_every_op() -> None:
    default = set(torch.export.default_decompositions())  # first: it imports modules that register more
    table = export.decompositions()
    assert len(ops()) > 10
    assert {op.overload for op in ops().values()} < set(table)
    assert default < set(table)


def test_a_convolution_is_decomposed_for_all_sizes(tmp_path: Path, measure: Any) -> None:
    program = op_program(mamba_ops.causal_conv1d, "rows")
    exported = program.export()
    assert measure(program, saved(exported, tmp_path / "program.pt2").module()) == 0
    assert measure(program, decomposed(exported).module()) <= FLOAT32


@pytest.mark.parametrize("dt_min", [0.0, -math.inf])
def test_no_argument_is_infinite(dt_min: float) -> None:
    """AOTInductor writes arguments as JSON, which has no infinity."""
    layer = layer_program("mamba2").module
    layer.dt_min = dt_min
    with torch.no_grad():
        program = torch.export.export(layer, (torch.zeros(1, 5, 24),))
    [node] = [n for n in program.graph.nodes if "mamba_chunk_scan" in str(n.target)]
    largest = torch.finfo(torch.float32).max
    assert node.kwargs["dt_max"] == largest
    assert node.kwargs.get("dt_min", 0.0) == max(dt_min, -largest)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "pattern"), CASES)
def test_ops_are_saved_and_decomposed(op: Op[...], pattern: str, tmp_path: Path, measure: Any) -> None:
    program = op_program(op, pattern)
    exported = saved(program.export(), tmp_path / "program.pt2")
    assert measure(program, exported.module()) == 0
    if op.name in READS_LENGTHS and pattern == "packed speculative":
        with pytest.raises(ValueError, match=f"{op.name}: cu_seqlens: got a tensor, expected None in an exported"):
            decomposed(exported)
        return
    assert measure(program, decomposed(exported).module()) <= FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_saved_and_decomposed(kind: str, grad: bool, tmp_path: Path, measure: Any) -> None:
    program = layer_program(kind)
    with torch.set_grad_enabled(grad):  # with parameters that require grad, the program has the functional ops
        exported = torch.export.export(program.module, program.calls[0], dynamic_shapes=program.dynamic)
    assert measure(program, saved(exported, tmp_path / "program.pt2").module()) == 0
    assert measure(program, decomposed(exported).module()) <= FLOAT32


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", sorted({case.values[0] for case in CASES}, key=str), ids=lambda op: op.name)
def test_ops_are_packaged(op: Op[...], tmp_path: Path, measure: Any) -> None:
    program = op_program(op, op.patterns[0])
    assert measure(program, packaged(program.export(), tmp_path / "model.pt2")) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_packaged_and_swapped(kind: str, tmp_path: Path, measure: Any) -> None:
    program = layer_program(kind)
    run = packaged(program.export(), tmp_path / "model.pt2")
    assert measure(program, run) <= FLOAT32
    marker = mamba_ops.registry.Backend("marker", devices=None, priority=-1)
    try:
        marker.implements(mamba_ops.causal_conv1d, fill)
        with use_backend("marker"), record_selections() as runs:
            swapped = run(*program.calls[1])
        assert "marker" in [r.backend for r in runs]
        assert not torch.equal(swapped, run(*program.calls[1]))
    finally:
        marker.remove()


def fill(call: Any) -> None:
    call.output.fill_(7.0)


LOADING = """
import sys, torch, mamba_ops
torch.set_grad_enabled(False)
for path in sys.argv[1:]:
    run, calls = torch.export.load(path).module(), torch.load(path + ".calls")
    torch.save([(run(*call), call) for call in calls], path + ".results")
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_programs_are_loaded_in_another_process(tmp_path: Path, measure: Any) -> None:
    programs = {kind: layer_program(kind) for kind in LAYERS}
    programs |= {op.name: op_program(op, op.patterns[0]) for op in OPS}
    for name, program in programs.items():
        torch.export.save(program.export(), tmp_path / f"{name}.pt2")
        torch.save(program.calls, tmp_path / f"{name}.pt2.calls")
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-c",
        LOADING,
        *(str(tmp_path / f"{n}.pt2") for n in programs),
    ]
    subprocess.run(command, check=True)
    for name, program in programs.items():
        results = iter(torch.load(tmp_path / f"{name}.pt2.results"))

        def run(*call: Any) -> Any:
            output, after = next(results)  # noqa: B023
            for tensor, changed in zip(tensors_of(call), tensors_of(after), strict=True):
                tensor.copy_(changed)
            return output

        assert measure(program, run) == 0, name


WITHOUT = """
import sys, torch
inputs = torch.load(sys.argv[1])
print(torch.equal(torch.export.load(sys.argv[2]).module()(*inputs["call"]), inputs["of_program"]))
got = torch._inductor.aoti_load_package(sys.argv[3])(*inputs["call"])
print(float((got - inputs["of_program"]).abs().max()) < 1e-5, "mamba_ops" in sys.modules)
program, package = sys.argv[4:]
for load in (lambda: torch.export.load(program), lambda: torch._inductor.aoti_load_package(package)(*inputs["call"])):
    try:
        load()
        print("no error")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_decomposed_program_runs_without_this_package(tmp_path: Path) -> None:
    """And one that is not says which op is missing."""
    program = layer_program("mamba2")
    exported = program.export()
    plain = decomposed(exported)
    call = program.calls[1]
    torch.save({"call": call, "of_program": plain.module()(*call).detach()}, tmp_path / "inputs.pt")
    paths = [tmp_path / name for name in ("inputs.pt", "plain.pt2", "plain_model.pt2", "program.pt2", "model.pt2")]
    torch.export.save(plain, paths[1])
    torch._inductor.aoti_compile_and_package(plain, package_path=str(paths[2]))
    torch.export.save(exported, paths[3])
    torch._inductor.aoti_compile_and_package(exported, package_path=str(paths[4]))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, paths)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True\nTrue False\n"), done.stdout + done.stderr
    assert "no error" not in done.stdout
    assert "torch.ops.mamba_ops.causal_conv1d" in done.stderr  # torch.export.load says it in a warning
    assert "Could not find schema for mamba_ops::causal_conv1d" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("is_step", [False, True], ids=["prefill", "step"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_caches_are_decomposed(kind: str, is_step: bool, measure: Any) -> None:
    program = cached_program(kind, is_step)
    assert measure(program, decomposed(program.export()).module()) <= FLOAT32
