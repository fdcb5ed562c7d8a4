"""Ops and layers as ONNX models in onnxruntime, decomposed: prompts and steps, of other sizes than the exported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_ops.registry import Op
from tests.export.programs import (
    FLOAT32,
    LAYERS,
    Program,
    Returned,
    cached_program,
    decomposed,
    layer_program,
    op_cases,
    op_program,
    tensors_of,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # the exporter's own
]
for name in ("onnx", "onnxscript"):
    pytest.importorskip(name, reason="pip install 'mamba-ops[export]' brings it")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'mamba-ops[export]' brings it")

READS_LENGTHS = {"selective_state_update", "gated_delta_rule_update", "kda_update", "mamba3_state_update"}
MOST = 512
"""Rows, tokens and the like in a call of an op; the less, the less time a program of the gated delta rule takes."""
CASES = [
    pytest.param(op, pattern, id=f"{op.name}-{pattern}")
    for op, pattern in op_cases()
    if not (op.name in READS_LENGTHS and pattern == "packed speculative")  # is refused: test_programs
    and "channel-major" not in pattern  # a matter of strides, which ONNX has not
]


def onnx_model(program: Program, path: Path) -> Callable[..., list[torch.Tensor]]:
    """A decomposed program as onnxruntime runs it."""
    with torch.no_grad():
        torch.onnx.export(decomposed(program.export()), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]

    def run(*call: Any) -> list[torch.Tensor]:
        inputs = (t.contiguous().numpy() for t in tensors_of(call))
        return [torch.from_numpy(o) for o in session.run(None, dict(zip(names, inputs, strict=True)))]

    return run


@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind: str, tmp_path: Path, measure: Any) -> None:
    program = layer_program(kind)
    assert measure(program, onnx_model(program, tmp_path / "model.onnx")) <= FLOAT32


@pytest.mark.parametrize("is_step", [False, True], ids=["prefill", "step"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_caches(kind: str, is_step: bool, tmp_path: Path, measure: Any) -> None:
    program = cached_program(kind, is_step)
    assert measure(program, onnx_model(program, tmp_path / "model.onnx")) <= FLOAT32


@pytest.mark.parametrize(("op", "pattern"), CASES)
def test_ops(op: Op[...], pattern: str, tmp_path: Path, measure: Any) -> None:
    program = op_program(op, pattern, most=MOST)
    returned = Program(Returned(program.module), program.calls, program.dynamic)  # type: ignore[arg-type]
    assert measure(returned, onnx_model(returned, tmp_path / "model.onnx")) <= FLOAT32
