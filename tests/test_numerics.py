"""Every op x backend x sample against the oracle; and what a result may not depend on."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_ops.ops._common import chunk_layout
from mamba_ops.registry import Op, Sample
from mamba_ops.testing.judge import front_on, refusal, results, with_output
from tests.conftest import ACCELERATOR
from tests.harness import OPS, PARTIAL, SIZES, backends_here, cases, expected, judge, samples_for, truncates

DEVICE = ACCELERATOR or torch.device("cpu")
PAIRS = [pytest.param(op, backend, id=f"{op.name}-{backend}") for op in OPS for backend in backends_here(op, DEVICE)]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("op", "backend", "sample"), cases(DEVICE))
def test_against_the_oracle(op: Op[...], backend: str, sample: Sample) -> None:
    judge(op, sample, front_on(op, backend))


@pytest.mark.parametrize(
    ("op", "backend", "dtype", "state_dtype"),
    [
        pytest.param(
            *pair.values,
            dtype,
            state_dtype,
            id=f"{pair.id}-{dtype}-{state_dtype}",
            # interpreted, each pair takes seconds: every day float32 and the pair that models are served in
            marks=pytest.mark.slow
            if ACCELERATOR is None
            and pair.values[1] == "triton"
            and (dtype, state_dtype) not in ((torch.float32,) * 2, (torch.bfloat16, torch.float32))
            else (),
        )
        for pair in PAIRS
        for dtype in FLOATS
        for state_dtype in FLOATS
        if dtype == torch.float32 or not truncates(*pair.values, DEVICE)
    ],
)
def test_dtype_pairs(op: Op[...], backend: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    sizes = SIZES.get((backend, op.name), {})
    samples = op.make_samples(DEVICE, dtype=dtype, state_dtype=state_dtype, **sizes)
    takes_all = not sizes and backend not in PARTIAL
    taken = [s for s in (samples[0], samples[-1]) if takes_all or refusal(op, backend, s) is None]
    if not taken:
        pytest.skip(f"{backend} takes none of the samples here")
    for sample in taken:
        judge(op, sample, front_on(op, backend))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_reference_gives_the_truth_for_float64(op: Op[...]) -> None:
    # less those whose state has a dtype that it must have
    samples = [s for s in op.make_samples("cpu") if not {"rounding_seed", "state_scale"} & s.kwargs.keys()]
    assert samples
    for sample in samples:
        exact = with_output(op, sample).to(torch.float64).clone()
        expected_fp64 = expected(op, exact, torch.float64)
        front_on(op, "torch")(*exact.args, **exact.kwargs)
        for name, got in results(op, exact).items():
            torch.testing.assert_close(got, expected_fp64[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("op", "backend", "sample"),
    # interpreted, a kernel is a sequence of numpy's functions: nothing there for every day
    cases(DEVICE, slow=lambda op, backend, sample: ACCELERATOR is None and backend == "triton"),
)
def test_same_bits_again(op: Op[...], backend: str, sample: Sample) -> None:
    sample = with_output(op, sample)
    runs = [sample.clone(), sample.clone()]
    for run in runs:
        front_on(op, backend)(*run.args, **run.kwargs)
    for name, first in results(op, runs[0]).items():
        assert torch.equal(first, results(op, runs[1])[name])


class _HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, which would stop a CUDA graph from being captured."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", [op for op in OPS if not op.composed], ids=lambda op: op.name)
def test_references_do_not_read_the_host(op: Op[...], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the length of the longest packed row in the update ops, as their docstrings say."""
    monkeypatch.setattr(chunk_layout, "are_here", lambda lengths: False)  # as on a device
    for sample in op.make_samples("cpu"):
        is_update = op.name in ("selective_state_update", "gated_delta_rule_update", "kda_update")
        packed = is_update and sample.kwargs.get("cu_seqlens") is not None
        with _HostReads() as reads:
            op.kernels["torch"].function(**op.bind(sample.clone().args, sample.clone().kwargs))
        assert reads.count == int(packed), sample


@pytest.mark.parametrize("op", [op for op in OPS if not op.composed], ids=lambda op: op.name)
def test_references_as_on_a_device(op: Op[...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do where the host does not know how long rows are; on a CPU some read them one by one."""
    monkeypatch.setattr(chunk_layout, "are_here", lambda lengths: False)
    for sample in op.make_samples("cpu"):
        judge(op, sample, front_on(op, "torch"))


@pytest.mark.parametrize(("op", "backend"), [pair for pair in PAIRS if pair.values[1] in pair.values[0].kernels])
def test_a_row_does_not_depend_on_the_others(op: Op[...], backend: str) -> None:
    """Each row of the base sample gives the same bits alone, and among neighbours that are NaN."""
    if not (samples := samples_for(op, backend, DEVICE)):
        pytest.skip(f"{backend} takes none of the samples here")
    sample = samples[0]
    whole = with_output(op, sample).clone()
    front_on(op, backend)(*whole.args, **whole.kwargs)
    rows = op.bind(whole.args, whole.kwargs)["output"].shape[0]
    bound = {n: v for n, v in op.bind(whole.args, whole.kwargs).items() if isinstance(v, Tensor)}
    of_rows = {"out", *(n for n, v in bound.items() if v.shape[0] == rows and n not in op.mutates)}
    tokens = {n for n in of_rows & bound.keys() if bound[n].is_floating_point()}
    assert tokens
    names = [p.name for p in op.parameters]

    def change(value: object, name: str, row: int, alone: bool) -> object:
        if not isinstance(value, Tensor) or name not in of_rows:
            return value
        if alone:
            return value[row : row + 1]
        if name not in tokens:
            return value
        poisoned = torch.full_like(value, torch.nan)
        poisoned[row] = value[row]
        return poisoned

    for row in range(rows):
        for alone in (True, False):
            run = with_output(op, sample).clone()
            args = tuple(change(v, n, row, alone) for n, v in zip(names, run.args, strict=False))
            kwargs = {n: change(v, n, row, alone) for n, v in run.kwargs.items()}
            out = front_on(op, backend)(*args, **kwargs)
            assert torch.equal(out[0 if alone else row], op.bind(whole.args, whole.kwargs)["output"][row])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_samples_reach_every_argument(op: Op[...]) -> None:
    """Over an op's samples every argument takes two values, and every optional is absent once and present once."""
    seen = [op.bind(s.args, s.kwargs) | {"output": s.kwargs.get("out")} for s in op.make_samples(DEVICE)]
    for p in op.parameters:
        values = [arguments[p.name] for arguments in seen]
        if p.default is None or p.name == "output":
            assert any(v is None for v in values), p.name
            assert any(v is not None for v in values), p.name
        facts = {(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in values}
        assert len(facts) > 1, p.name


def test_packed_rows_make_no_more_pieces_than_they_have() -> None:
    """On a CPU, where lengths are there; elsewhere there is room for what any lengths could need."""
    x, ends = torch.zeros(40, 1), torch.tensor([0, 8, 8, 29, 40])
    layout = chunk_layout.chunk_layout(x, 8, 1, ends, None)
    assert (layout.row.tolist(), layout.longest) == ([0, 2, 2, 2, 3, 3], 3)
    assert chunk_layout.chunk_layout(x, 8, 1, torch.zeros(3, dtype=torch.long), None).longest == 1
