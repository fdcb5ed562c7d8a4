"""The tests are tested: bugs planted in the backward kernels are all caught by `judge`."""

from pathlib import Path

import pytest
import torch

from mamba_ops.registry import Backend, Op
from tests.conftest import ACCELERATOR
from tests.harness import OPS
from tests.test_mutants import changed, load, source_of
from tests.training.gradients import TRAINED, judge
from tests.training.planted_bugs import BUGS

pytest.importorskip("triton", reason="the kernels that bugs are planted in are Triton's")

DEVICE = ACCELERATOR or torch.device("cpu")
TRITON = [op for op in TRAINED if op.name in BUGS]
OWN = {p.parent.name for p in Path(__file__).parents[1].glob("ops/*/test_backward.py")}  # these plant bugs of their own


def test_every_backward_kernel_has_bugs() -> None:
    assert {op.name for op in TRAINED if "triton" in op.backward_op.kernels} == set(BUGS) | OWN
    assert not OWN.intersection(BUGS)
    assert all(len(bugs) >= 4 for bugs in BUGS.values())


@pytest.mark.parametrize("op", TRITON, ids=lambda op: op.name)
def test_every_bug_can_be_planted(op: Op[...]) -> None:
    for bug in BUGS[op.name].values():
        changed(source_of(op), bug)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, id=f"{op.name}-{name}", marks=[pytest.mark.slow] * (number > 0 and ACCELERATOR is None))
        for op in TRITON
        for number, name in enumerate(BUGS[op.name])
    ],
)
def test_planted_bug_is_caught(op: Op[...], name: str, tmp_path: Path) -> None:
    module = load(tmp_path / f"mutant_{op.name}.py", changed(source_of(op), BUGS[op.name][name]))
    backend = Backend("mutant", devices=[DEVICE.type])
    try:
        backend.implements(op.backward_op)(getattr(module, f"{op.name}_backward"))
        caught = []
        for sample in op.backward_op.make_samples(DEVICE):
            try:
                judge(op, sample, backend.name)
            except AssertionError:
                caught.append(sample.name)
                break
        assert caught, "no sample caught it"
    finally:
        backend.remove()


def test_all_that_train_are_tested() -> None:
    assert [op for op in OPS if op.forward_op is not None] == TRAINED
    assert len(TRAINED) >= 2
