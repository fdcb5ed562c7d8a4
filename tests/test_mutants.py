"""The tests are tested: bugs planted in each kernel's source, one at a time, are all caught by `judge`.

Only bugs that stay inside their tensors: an interpreted kernel that leaves them takes the process with it.
"""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mamba_ops
from mamba_ops.ops._common import mixing
from mamba_ops.registry import Backend, Op, Sample
from mamba_ops.testing.judge import front_on
from tests.conftest import ACCELERATOR
from tests.harness import OPS, judge, own_refusal
from tests.ops.tables import tables_of

pytest.importorskip("triton", reason="the kernels that bugs are planted in are Triton's")

DEVICE = ACCELERATOR or torch.device("cpu")
Bug = tuple[str, str]
TABLES = ("BUGS", "SLOW_BUGS", "KERNEL_BUGS")
MUTANTS = [
    pytest.param((op, table, name), marks=pytest.mark.slow if slow else (), id=f"{op.name}-{name}")
    for op in OPS
    for table in TABLES
    for number, name in enumerate(getattr(tables_of(op), table, {}))
    for slow in [table == "SLOW_BUGS" or (number >= 4 and ACCELERATOR is None)]  # interpreted, four for every day
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_ten_bugs_of_every_op(op: Op[...]) -> None:
    tables = tables_of(op)
    assert len({**tables.BUGS, **getattr(tables, "SLOW_BUGS", {})}) >= 10


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_bug_can_be_planted(op: Op[...]) -> None:
    """Those that are slow to catch, too."""
    for table in TABLES:
        for bug in getattr(tables_of(op), table, {}).values():
            changed(source_of(op, table), bug)


@pytest.mark.parametrize("op", [op for op in OPS if op.composed and "triton" in op.kernels], ids=lambda op: op.name)
def test_ten_bugs_of_a_composed_ops_own_kernel(op: Op[...]) -> None:
    assert len(tables_of(op).KERNEL_BUGS) >= 10


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Op[...], str, list[Sample]]]:
    """An op, the name of a backend that has our kernel with one bug in it, and the samples that this kernel takes."""
    op, table, name = request.param
    bug: Bug = getattr(tables_of(op), table)[name]
    kernel = composed_with(bug, op) if is_composed(op, table) else triton_with(bug, op, tmp_path, table)
    samples = op.make_samples(DEVICE)
    if table == "KERNEL_BUGS":
        samples = [sample for sample in samples if own_refusal(op, "triton", sample) is None]
    first = getattr(tables_of(op), "SEEN_BY", {}).get(name, samples[0].name)
    assert first in [sample.name for sample in samples]
    samples.sort(key=lambda sample: sample.name != first)
    backend = Backend("mutant", devices=[DEVICE.type])
    backend.implements(op)(kernel)
    yield op, backend.name, samples
    backend.remove()


def is_composed(op: Op[...], table: str) -> bool:
    """Whether a table's bugs are for the body of a composed op, and not for its own kernel."""
    return op.composed and table != "KERNEL_BUGS"


def triton_with(bug: Bug, op: Op[...], folder: Path, table: str = "BUGS") -> Callable[..., None]:
    """The Triton kernel with a bug."""
    source = changed(source_of(op, table), bug)
    kernel: Callable[..., None] = getattr(load(folder / f"mutant_{op.name}.py", source), op.name)
    return kernel


def composed_with(bug: Bug, op: Op[...]) -> Callable[..., None]:
    """The body of a composed op, and what reads its plan, with a bug."""
    scope = vars(mixing) | vars(importlib.import_module(op.kernels["composed"].source.partition(":")[0]))
    del scope[op.name], scope["batch_of"], scope["_batch_of"], scope["Rows"]
    scope["_latest"] = None  # the latest batch was read without the bug
    exec(compile(changed(source_of(op), bug), f"mutant_{op.name}.py", "exec"), scope)
    kernel: Callable[..., None] = scope[op.name]
    return kernel


def source_of(op: Op[...], table: str = "BUGS") -> str:
    """The text of an op's Triton kernels, of all files as if they were one, with what several ops share; or of the body
    of a composed op.
    """
    if not is_composed(op, table):
        folder = Path(mamba_ops.__path__[0]) / "ops" / op.name
        files = sorted([*folder.glob("triton.py"), *folder.glob("triton*/[a-z]*.py")])
        texts = [path.read_text() for path in files]
        names = rf"{op.name}\.triton[\w.]*"
        for shared in ("delta_rule", "delta_rule_update", "mamba3", "states"):
            if any(f"ops._triton.{shared} import" in text for text in texts):
                texts.insert(0, (folder.parent / "_triton" / f"{shared}.py").read_text())
                names += rf"|_triton\.{shared}"
        own = re.compile(rf"^from mamba_ops\.ops\.({names}) import (\([^)]*\)|.*)$", re.MULTILINE)
        return "\n\n".join(own.sub("", text) for text in texts)
    composed = importlib.import_module(op.kernels["composed"].source.partition(":")[0])
    return "\n\n".join(map(inspect.getsource, (composed, mixing.Rows, mixing.batch_of, mixing._batch_of)))


def changed(source: str, bug: Bug) -> str:
    right, wrong = bug
    assert right in source, f"{right!r} is no longer in the kernel; plant the bug elsewhere"
    return source.replace(right, wrong)


@pytest.mark.parametrize("planted", MUTANTS, indirect=True)
def test_planted_bug_is_caught(planted: tuple[Op[...], str, list[Sample]]) -> None:
    op, backend, samples = planted
    for sample in samples:
        try:
            judge(op, sample, front_on(op, backend))
        except AssertionError:
            return
    pytest.fail("no sample caught it")


def load(path: Path, source: str) -> ModuleType:
    path.write_text(source)  # Triton reads the source of its kernels from a file
    # The last but one part of a kernel's module is its op; this one must not replace the real op's launches.
    spec = importlib.util.spec_from_file_location(f"mutants.{path.stem}.triton", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
