"""A warm-up leaves nothing to compile, and what would compile without one says so."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import mamba_ops
from mamba_ops import layers
from mamba_ops.cold_start import warming
from mamba_ops.cold_start.layers import TOKENS
from mamba_ops.ops._triton import op_of
from mamba_ops.registry import Backend, CompilationError, Namespace, RegistryError, Sample, jit, require_out
from tests.harness import OPS, compiled_for_a_gpu, environment

COVER = """
from tests.warm_up_cover import cover
print(json.dumps(cover(sys.argv[1], steps=int(sys.argv[2]), training=sys.argv[3] == "training")))
"""
STEPS = [12, pytest.param(30, marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["tidy", "odd"])
def test_after_a_warm_up_random_calls_compile_nothing(name, steps):
    result = compiled_for_a_gpu(COVER, name, steps, "inference", compiles=False)
    assert result["skipped"] == []
    assert sum(result["variants"].values()) == result["compiled"]
    assert len(result["variants"]) >= 15
    assert max(result["variants"].values()) <= 15, "a new way to call a kernel compiles it anew"
    assert result["again"] == 0
    assert result["again_cached"]
    assert result["again_seconds"] < 0.05
    assert {row[0].partition("::")[2] for row in result["rows"]} == {op.name for op in OPS}
    assert {row[1] for row in result["rows"]} == {"triton", "composed"}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["tidy", pytest.param("odd", marks=pytest.mark.slow)])
def test_after_a_warm_up_for_training_random_steps_compile_nothing(name, steps):
    result = compiled_for_a_gpu(COVER, name, steps, "training", compiles=False)
    assert result["skipped"] == []
    assert result["again"] == 0
    assert result["again_cached"]
    backwards = {f"mamba_ops::{op.name}_backward" for op in OPS if op.backward_op is not None}
    assert len(backwards) >= 4
    assert {(name, "triton") for name in backwards} <= {(row[0], row[1]) for row in result["rows"]}


BACKWARDS = """
import torch
import mamba_ops
from mamba_ops.ops._triton import slices
from mamba_ops.registry import ops

options = {"device": "cpu", "training": True}
warmed = {}
for name, op in ((name, op) for name, op in list(ops().items()) if not op.returns and op.backward_op is not None):
    size = "v_dim" if name.startswith("chunk") else "dim"
    for dtype, sizes in ((None, {}), (torch.float16, {size: 32})):
        dtypes = None if dtype is None else [dtype]
        warmed[name] = sorted({row.op for row in mamba_ops.warm_up(op, dtypes=dtypes, sizes=sizes, **options)})
        asked = {**sizes, "state_dtype": torch.float32} | ({} if dtype is None else {"dtype": dtype})
        for slices.KEPT, slices.WALKS in ((256 << 20, 256), (1, 1)):
            with mamba_ops.no_jit():
                for sample in op.backward_op.make_samples("cpu", **asked):
                    op.backward_op(*sample.args)
print(json.dumps(warmed))
"""


@pytest.mark.slow
def test_an_ops_warm_up_for_training_has_its_backward():
    """With the sizes and dtypes that are asked for, and of so many rows that they go in slices."""
    warmed = compiled_for_a_gpu(BACKWARDS, compiles=False)
    assert len(warmed) >= 4
    for name, rows in warmed.items():
        assert {f"mamba_ops::{name}", f"mamba_ops::{name}_forward", f"mamba_ops::{name}_backward"} <= set(rows)


FORBIDDEN = """
import warnings
import torch, mamba_ops
from mamba_ops.registry import CompilationError, ops

torch.set_grad_enabled(False)
said, raised = {}, []
for name, op in sorted((item for item in ops().items() if not item[1].returns), key=lambda item: item[1].composed):
    for sample in op.make_samples("cpu"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with mamba_ops.no_jit():
                    op(*sample.args, **sample.kwargs)
            except CompilationError as error:
                raised.append(name)
                said.setdefault(name, []).append(str(error))
            with mamba_ops.no_jit(warn=True):
                op(*sample.args, **sample.kwargs)
            with mamba_ops.no_jit():
                op(*sample.args, **sample.kwargs)
        said.setdefault(name, []).extend(str(w.message) for w in caught)
print(json.dumps([said, raised]))
"""


def test_without_a_warm_up_no_jit_raises_for_each_kernel():
    said, raised = compiled_for_a_gpu(FORBIDDEN, compiles=False)
    assert set(raised) == {op.name for op in OPS}
    names = {k.split(" would be compiled")[0].rpartition(" ")[2] for texts in said.values() for k in texts}
    kernels = {f"{op_of(module)}.{function}" for module, _, function in (name.rpartition(".") for name in names)}
    assert kernels == {
        "causal_conv1d._kernel",
        "causal_conv1d._runs",
        "causal_conv1d_update._kernel",
        "chunk_gated_delta_rule._scan",
        "chunk_gated_delta_rule._solve",
        "chunk_kda._decay",
        "chunk_kda._scan",
        "chunk_kda._solve",
        "chunk_kda._steep_pairs",
        "delta_rule_update._kernel",
        "layout._transpose",
        "mamba3_chunk_scan._begin",
        "mamba3_chunk_scan._rotate",
        "mamba3_chunk_scan._scan",
        "mamba3_chunk_scan._turns",
        "mamba3_chunk_scan._weigh",
        "mamba3_state_update._kernel",
        "mamba_chunk_scan._scan",
        "mamba_chunk_scan._states",
        "mamba_chunk_scan._steps",
        "rms_norm._kernel",
        "selective_scan._ends",
        "selective_scan._outputs",
        "selective_scan._starts",
        "selective_state_update._kernel",
    }
    update = said["selective_state_update"]
    assert "no variant of it is loaded" in update[0]
    call = "mamba_ops.warm_up(mamba_ops.selective_state_update, device='cpu', backends=['triton'])"
    assert f"{call} with this call's sizes and dtypes" in update[0]
    assert any("state is *fp16, not *fp32 as in the nearest of" in sentence for sentence in update)


LAYOUTS = """
import mamba_ops
from mamba_ops.ops._triton import _triton, layout
from mamba_ops.registry import ops

loaded = {}
for name, op in ((name, op) for name, op in ops().items() if not op.returns):
    with _triton.unloaded([layout._transpose]):
        mamba_ops.warm_up(op, device="cpu")
        loaded[name] = sum(variant.loaded for variant in _triton.variants(layout._transpose))
print(json.dumps(loaded))
"""


def test_an_ops_warm_up_is_for_activations_in_any_layout_too():
    """Of two bytes a number, and of four."""
    loaded = compiled_for_a_gpu(LAYOUTS, compiles=False)
    without = {op.name for op in OPS if "triton" not in op.kernels} | {"causal_conv1d", "causal_conv1d_update"}
    assert loaded == {op.name: 0 if op.name in without else 2 for op in OPS}


CACHE = """
import os
import torch, mamba_ops
from mamba_ops.ops._triton import _triton

_triton.LAUNCHERS.append(compile_only.__name__)
compile_only.Driver.launcher_cls = compile_only.Launcher
report = mamba_ops.warm_up("gated_delta_rule_update", device="cpu")
cached = [row.cached for row in report]
print(json.dumps([os.getpid(), report.compiled, report.loaded, cached, len(compile_only.launches)]))
"""


def test_a_second_process_compiles_nothing(tmp_path):
    launchers = tmp_path / "launchers"
    launchers.mkdir()
    places = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "LAUNCHERS": str(launchers)}
    process, compiled, loaded, cached, launches = compiled_for_a_gpu(CACHE, **places)
    assert compiled > 5
    assert loaded == 0
    assert not all(cached)
    assert launches > len(cached)  # what was not there is called again
    made = [path.name.split() for path in launchers.iterdir()]  # beside each kernel, and not in this process
    assert len({kernel for kernel, _ in made}) == compiled
    assert str(process) not in {by for _, by in made}
    _, *again = compiled_for_a_gpu(CACHE, **places)
    copies = 3  # of an activation and an output in another layout, and back
    assert again == [0, compiled, [True] * len(cached), len(cached) + copies]  # and what is there is called once


# -- without Triton ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toy():
    """Another package's op, with samples and a backend that compiles when it is first called with a dtype."""
    namespace = Namespace("toy_warm_up")

    @namespace.op()
    def twice(x: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Twice x."""
        return torch.mul(x, 2, out=require_out(out))

    @twice.allocate_output
    def _(x):
        return torch.empty_like(x)

    @twice.samples
    def _(device, *, dtype=torch.float32, size: int = 3):
        for rows in (1, 2):
            yield Sample(f"{rows} rows", (torch.randn(rows, size, generator=torch.Generator()).to(device, dtype),))

    calls, compiled = [], set()
    backend = Backend("toy_jit", devices=("cpu",), priority=5)

    @backend.implements(twice)
    def _(x, *, output):
        if x.dtype not in compiled:
            jit.announce("toy.kernel", f"x is {x.dtype}")
            compiled.add(x.dtype)
        calls.append(tuple(x.shape))
        torch.mul(x, 2, out=output)

    yield SimpleNamespace(op=twice, calls=calls, compiled=compiled)
    backend.remove()
    namespace.remove()


def test_another_packages_op_is_warmed_up_by_its_samples(toy):
    with torch.no_grad():
        report = mamba_ops.warm_up([toy.op], device="cpu", dtypes=[torch.float64], sizes={"size": 7})
    assert [(row.op, row.backend, row.variant, row.cached) for row in report] == [
        ("toy_warm_up::twice", "toy_jit", "1 rows", False),
        ("toy_warm_up::twice", "toy_jit", "2 rows", False),
    ]
    assert toy.calls == [(1, 7), (2, 7)]
    with mamba_ops.no_jit():
        toy.op(torch.randn(3, dtype=torch.float64))
    again = mamba_ops.warm_up(toy.op, device="cpu", dtypes=[torch.float64], sizes={"size": 7})
    assert [row.cached for row in again] == [True, True]
    assert again.seconds < 0.05
    assert len(toy.calls) == 3


def test_what_compiles_unasked_names_the_kernel_the_cause_and_the_warm_up(toy):
    with mamba_ops.no_jit(), pytest.raises(CompilationError) as raised:
        toy.op(torch.ones(2, 5))
    assert str(raised.value) == (
        "toy_warm_up::twice: kernel toy.kernel would be compiled or loaded now, and no_jit() is active: x is "
        "torch.float32; beforehand: mamba_ops.warm_up(toy_warm_up.twice, device='cpu', backends=['toy_jit']) with this "
        "call's sizes and dtypes"
    )
    assert toy.calls == []


def test_no_jit_may_warn_and_the_environment_may_ask_for_it(toy):
    with mamba_ops.no_jit(warn=True), pytest.warns(RuntimeWarning, match=r"toy\.kernel would be compiled"):
        toy.op(torch.ones(2))
    toy.compiled.clear()
    with environment(MAMBA_OPS_NO_JIT="1"), pytest.raises(CompilationError, match="and MAMBA_OPS_NO_JIT=1: x is"):
        toy.op(torch.ones(2))
    with environment(MAMBA_OPS_NO_JIT="warn"), pytest.warns(RuntimeWarning, match="MAMBA_OPS_NO_JIT=warn"):
        toy.op(torch.ones(2))
    toy.compiled.clear()
    with environment(MAMBA_OPS_NO_JIT="1"):
        mamba_ops.warm_up(toy.op, device="cpu")
        toy.op(torch.ones(2))


def test_while_a_graph_is_captured_nothing_compiles_whatever_the_switch(toy, monkeypatch):
    monkeypatch.setattr(jit, "is_capturing", lambda: True)
    with pytest.raises(CompilationError, match="and a graph is being captured: x is"):
        toy.op(torch.ones(2))
    assert toy.calls == []


@pytest.mark.gpu
def test_a_kernel_that_would_compile_in_a_capture_raises(device):
    module = torch.get_device_module(device)
    op = mamba_ops.causal_conv1d_update
    x, state, weight = (torch.ones(shape, device=device) for shape in ((2, 40), (2, 40, 5), (40, 6)))
    graph = module.CUDAGraph()
    with pytest.raises(CompilationError, match="a graph is being captured"), module.graph(graph):
        op(x, state, weight)


def test_alike_layers_are_warmed_up_once_and_told_of_in_one_line(caplog):
    model = nn.Sequential(*(layers.Mamba2(24, heads=2, head_dim=8, dstate=4, chunk_size=8) for _ in range(3)))
    with caplog.at_level(logging.INFO, logger="mamba_ops"):
        report = mamba_ops.warm_up(model, device="cpu")
    assert len({row.variant for row in report}) == 17
    assert len(report) == len({(row.op, row.variant) for row in report})
    assert [record.name for record in caplog.records] == ["mamba_ops"]


def test_the_last_that_it_does_is_what_serving_does_all_the_time(monkeypatch):
    model = nn.Sequential(*(layers.Mamba(24, dstate=4) for _ in range(3)))
    done = []
    monkeypatch.setattr(warming.gc, "collect", lambda: done.append("collected"))
    model[0].register_forward_hook(lambda layer, args, output: done.append(tuple(output.shape)))
    assert mamba_ops.warm_up(model, device="cpu").skipped == []
    assert done[-3:] == ["collected", (TOKENS + 1, 24), (TOKENS + 1, 24)]


def test_a_layer_that_is_incomplete_is_skipped_with_a_line():
    model = nn.ModuleDict({"good": layers.Mamba(24, dstate=4), "bad": layers.Mamba2(24, heads=3, head_dim=8, dstate=4)})
    del model["bad"].chunk_size
    report = mamba_ops.warm_up(model, device="cpu")
    assert all("selective" in row.op or "conv" in row.op or "mamba_mixing" in row.op for row in report)
    assert any(line.startswith("bad, ") and "chunk_size" in line for line in report.skipped)
    assert "skipped bad, " in str(report)


def test_layers_on_no_device_are_warmed_up_by_random_ones():
    layer = layers.GatedDeltaNet(24, num_k_heads=1, num_v_heads=2, head_k_dim=8, head_v_dim=8, device="meta")
    report = mamba_ops.warm_up(layer, device="cpu", dtypes=[(torch.bfloat16, torch.float32)])
    assert report.skipped == []
    assert {row.op.partition("::")[2] for row in report} >= {"chunk_gated_delta_rule", "gdn_mixing"}
    assert layer.A_log.is_meta


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model_or_ops": 3}, "model_or_ops: got 3, expected a model, an op or its name, or a list of these"),
        ({"dtypes": ["bf16"]}, "dtypes: got 'bf16', expected dtypes, or pairs of one of activations and one of states"),
        ({"dtypes": [(torch.bfloat16, None)]}, "dtypes: got (torch.bfloat16, None), expected dtypes, or pairs of"),
        ({"sizes": {"dim": -1}}, "dim: got -1, expected a positive number"),
        ({"processes": 0}, "processes: got 0, expected a positive number"),
    ],
)
def test_what_makes_no_sense_is_answered_before_anything_is_called(given, said):
    with pytest.raises(ValueError, match=f"^warm_up: {re.escape(said)}"):
        mamba_ops.warm_up(**{"model_or_ops": "selective_scan", "device": "cpu", **given})


def test_unknown_names_are_refused():
    with pytest.raises(RegistryError, match=r"unknown size 'dstates'; valid: dim, .* did you mean dstate\?"):
        mamba_ops.warm_up("selective_scan", device="cpu", sizes={"dstates": 16})
    with pytest.raises(RegistryError, match="unknown op 'no_such_op'"):
        mamba_ops.warm_up("no_such_op", device="cpu")
    with pytest.raises(RegistryError, match="unknown backend 'cutlass'"):
        mamba_ops.warm_up("selective_scan", device="cpu", backends=["cutlass"])
    with pytest.raises(ValueError, match="warm_up: model_or_ops: got Linear, expected"):
        mamba_ops.warm_up(nn.Linear(2, 2), device="cpu")


def test_the_callers_random_numbers_are_left_alone(toy):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    mamba_ops.warm_up(toy.op, device="cpu", sizes={"size": 11})
    assert torch.equal(torch.rand(4), expected)
