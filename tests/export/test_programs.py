"""Exported programs of every op and layer: saved, loaded, decomposed, packaged, and called with other lengths."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mamba_ops
from mamba_ops import export, record_selections, use_backend
from mamba_ops.registry import Op, ops
from tests.export.programs import LAYERS, Program, decomposed, layer_program, op_cases, op_program

CASES = [pytest.param(op, pattern, id=f"{op.name}-{pattern}") for op, pattern in op_cases()]
READS_LENGTHS = {"selective_state_update", "gated_delta_rule_update"}
"""Ops whose reference reads the longest of packed rows on the host: they cannot be decomposed there."""
FLOAT32 = 1e-5
"""Of what is decomposed: other orders of float32 sums; everything else is bit-equal."""


def packaged(program: torch.export.ExportedProgram, path: Path) -> Any:
    """The program, compiled by AOTInductor and loaded again."""
    return torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))


def saved(program: torch.export.ExportedProgram, path: Path) -> torch.export.ExportedProgram:
    """The program, saved and loaded again."""
    torch.export.save(program, path)
    return torch.export.load(path)


def test_the_table_has_every_op() -> None:
    table = export.decompositions()
    assert len(ops()) > 10
    assert {op.overload for op in ops().values()} < set(table)
    assert set(torch.export.default_decompositions()) < set(table)


def test_a_convolution_is_decomposed_for_all_sizes(tmp_path: Path) -> None:
    program = op_program(mamba_ops.causal_conv1d, "rows")
    exported = program.export()
    assert program.largest_difference(saved(exported, tmp_path / "program.pt2").module()) == 0
    assert program.largest_difference(decomposed(exported).module()) <= FLOAT32


def test_no_argument_is_infinite() -> None:
    """AOTInductor writes arguments as JSON, which has no infinity."""
    layer = layer_program("mamba2").module
    with torch.no_grad():
        program = torch.export.export(layer, (torch.zeros(1, 5, 24),))
    [node] = [n for n in program.graph.nodes if "mamba_chunk_scan" in str(n.target)]
    assert node.kwargs["dt_max"] == torch.finfo(torch.float32).max


@pytest.mark.slow
@pytest.mark.parametrize(("op", "pattern"), CASES)
def test_ops_are_saved_and_decomposed(op: Op[...], pattern: str, tmp_path: Path) -> None:
    program = op_program(op, pattern)
    exported = saved(program.export(), tmp_path / "program.pt2")
    assert program.largest_difference(exported.module()) == 0
    if op.name in READS_LENGTHS and pattern == "packed speculative":
        with pytest.raises(ValueError, match=f"{op.name}: cu_seqlens: got a tensor, expected None in an exported"):
            decomposed(exported)
        return
    assert program.largest_difference(decomposed(exported).module()) <= FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_saved_and_decomposed(kind: str, grad: bool, tmp_path: Path) -> None:
    program = layer_program(kind)
    with torch.set_grad_enabled(grad):  # with parameters that require grad, the program has the functional ops
        exported = torch.export.export(program.module, program.calls[0], dynamic_shapes=program.dynamic)
    assert program.largest_difference(saved(exported, tmp_path / "program.pt2").module()) == 0
    assert program.largest_difference(decomposed(exported).module()) <= FLOAT32


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("op", sorted({case.values[0] for case in CASES}, key=str), ids=lambda op: op.name)
def test_ops_are_packaged(op: Op[...], tmp_path: Path) -> None:
    program = op_program(op, op.patterns[0])
    assert program.largest_difference(packaged(program.export(), tmp_path / "model.pt2")) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_are_packaged_and_swapped(kind: str, tmp_path: Path) -> None:
    program = layer_program(kind)
    run = packaged(program.export(), tmp_path / "model.pt2")
    assert program.largest_difference(run) <= FLOAT32
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


def onnx_difference(program: Program, path: Path) -> float:
    """Of a decomposed program's ONNX model in onnxruntime."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="pip install 'mamba-ops[export]' brings it")
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'mamba-ops[export]' brings it")
    with torch.no_grad():
        torch.onnx.export(decomposed(program.export()), dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path)

    def run(*call: Any) -> Any:
        names = [i.name for i in session.get_inputs()]
        [output] = session.run(None, dict(zip(names, (t.numpy() for t in call), strict=True)))
        return torch.from_numpy(output)

    return program.largest_difference(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_run_in_onnxruntime(kind: str, tmp_path: Path) -> None:
    assert onnx_difference(layer_program(kind), tmp_path / "model.onnx") <= FLOAT32


class Step(nn.Module):
    """A decode step that takes its caches and returns them, as runtimes without in-place updates want it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, conv_state: torch.Tensor, ssm_state: torch.Tensor) -> Any:
        conv_state, ssm_state = conv_state.clone(), ssm_state.clone()
        return self.layer.step(hidden, conv_state, ssm_state), conv_state, ssm_state


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_steps_are_decomposed(kind: str) -> None:
    layer = layer_program(kind).module
    calls = []
    for rows in (3, 5):
        caches = [torch.randn_like(c) for c in layer.empty_caches(rows)]
        calls.append((torch.randn(rows, 24), *caches))
    program = Program(Step(layer), calls, tuple({0: torch.export.Dim.DYNAMIC} for _ in range(3)))
    assert program.largest_difference(decomposed(program.export()).module()) <= FLOAT32
