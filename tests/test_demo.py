"""The demo as data, the tools it shares with the benchmarks, and the benchmarks that need no GPU."""

import dataclasses
import inspect
import json
import math
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("rich", reason="the benchmarks and the demo's report are shown with it")

from rich.console import Console

from benchmarks import boundary as ladder
from benchmarks import swap
from mamba_ops import causal_conv1d_update, demo, explain, selective_state_update, use_backend
from mamba_ops.demo.boundary import bare_op, does_nothing, idle_backend, measure_boundary, us_per_call
from mamba_ops.demo.loop import loop_backend
from mamba_ops.demo.run import watch_compiler
from mamba_ops.registry import Backend, NoBackendError, UnknownNameError, ops

pytestmark = pytest.mark.xdist_group("demo")  # its times are taken side by side, not beside each other's

TEXT = b"A state space model reads one byte after another and forgets some of them."
OPS = [causal_conv1d_update, selective_state_update]
NAMES = set(ops())


@pytest.fixture(scope="module")
def report(device):
    yield demo.run_demo(TEXT, device=device, tokens=8)
    torch._dynamo.reset()


def test_one_graph_serves_both_compiled_runs(report):
    assert [(run.graphs, run.recompiles) for run in report.runs] == [(0, 0), (1, 0), (1, 0)]


def test_the_backend_changes_in_the_middle(report):
    eager, compiled, swapped = (run.kernel_calls for run in report.runs)
    [default] = eager
    assert eager == compiled == {default: 32}  # 2 layers of 2 ops, 8 steps
    assert swapped == {default: 16, report.swap_to: 16}


def test_all_runs_agree(report):
    assert all(run.difference <= report.tolerance and run.same_predictions == 1 for run in report.runs)
    assert report.problems == []


def test_predictions_depend_on_the_text():
    torch.manual_seed(0)
    model = demo.Decoder(2)
    with torch.no_grad():
        predicted = [model(torch.tensor([ord("a"), byte])).argmax(-1).tolist() for byte in TEXT]
    assert len({first for first, _ in predicted}) > 1  # the same byte again and again: only the caches differ
    assert len({second for _, second in predicted}) > 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"graphs": 2}, "2 graphs were compiled, expected 1"),
        ({"recompiles": 3}, "3 recompiles, expected none"),
        ({"difference": math.nan}, "compiled, swapped: a logit is nan off, expected at most"),
        ({"kernel_calls": {"torch": 32}}, "compiled, swapped: ran on torch, expected two"),
    ],
)
def test_a_report_says_what_is_wrong(report, change, sentence):
    wrong = dataclasses.replace(report, runs=(*report.runs[:-1], dataclasses.replace(report.runs[-1], **change)))
    [problem] = wrong.problems
    assert problem.startswith(sentence)
    assert "FAILED: " + problem in shown(wrong)


def test_a_report_is_shown_with_its_verdict(report):
    text = shown(report)
    assert "compiled, swapped" in text
    assert f"{report.swap_to} (16)" in text
    assert text.splitlines()[-1].startswith("OK: one graph, no recompile")


def shown(report: demo.DemoReport) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        demo.show(report, console)
    return capture.get()


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(demo.DemoError, match="got 3 bytes for each of 4 streams, expected at least 4"):
        demo.run_demo(TEXT[:15])


def test_a_swap_to_what_runs_anyway_is_refused(device, report):
    [default] = report.runs[0].kernel_calls
    with pytest.raises(demo.DemoError, match=f"{default} runs here anyway, expected a backend to swap to: .*loop"):
        demo.run_demo(TEXT, device=device, swap_to=default.upper())


def test_a_backend_that_nobody_has_is_refused(device):
    with pytest.raises(UnknownNameError, match=r"unknown backend 'nope'; valid: .*loop, torch"):
        demo.run_demo(TEXT, device=device, swap_to="nope")


def test_a_backend_that_refuses_is_not_compiled_for(device):
    picky = Backend("picky", devices=None, priority=-50)
    try:
        kernel = does_nothing(causal_conv1d_update.parameters)
        picky.implements(causal_conv1d_update, unless=lambda x: "never does")(kernel)
        before = counters["stats"]["unique_graphs"]
        with pytest.raises(NoBackendError, match="picky  never does"):
            demo.run_demo(TEXT, device=device, swap_to="picky")
        assert counters["stats"]["unique_graphs"] == before
    finally:
        picky.remove()


def test_the_demo_leaves_nothing_behind(report):
    assert {name for op in OPS for name in op.kernels}.isdisjoint({"loop", "idle"})
    assert set(ops()) == NAMES


def test_the_default_text_is_the_readme(monkeypatch, tmp_path):
    assert demo.read_text().startswith(b"# mamba-ops")
    monkeypatch.setattr(demo.run, "__file__", str(tmp_path / "mamba_ops" / "demo" / "run.py"))  # as in site-packages
    try:
        version("mamba-ops")
    except PackageNotFoundError:
        with pytest.raises(demo.DemoError, match="name a file"):
            demo.read_text()
    else:
        assert demo.read_text().startswith(b"# mamba-ops")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_loop_takes_what_it_says_and_computes_it(device, op):
    taken = []
    with torch.no_grad(), loop_backend():
        for sample in op.make_samples(device):
            looped, expected = sample.clone(), sample.clone()
            with use_backend("loop"):
                explanation = explain(op, *sample.args, **sample.kwargs)
                if explanation.backend is None:
                    assert explanation.reasons["loop"].startswith("takes ")
                    continue
                result = op(*looped.args, **looped.kwargs)
            with use_backend("torch"):
                torch.testing.assert_close(result, op(*expected.args, **expected.kwargs), atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(looped.args, expected.args, atol=1e-2, rtol=1e-2)  # the caches
            taken.append(sample.name)
    assert "no optional" in " ".join(taken)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_watch_counts_graphs_and_recompiles():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with watch_compiler() as watch:
        compiled(torch.zeros(2))
        assert (watch.graphs, watch.recompiles) == (1, 0)
        compiled(torch.zeros(3))
        assert (watch.graphs, watch.recompiles) == (2, 1)


# -- the boundary -----------------------------------------------------------------------------------------------------


def test_a_function_that_does_nothing_has_the_signature_asked_for():
    function = does_nothing(selective_state_update.parameters)
    wanted = [p.replace(annotation=p.empty) for p in selective_state_update.parameters]
    assert list(inspect.signature(function).parameters.values()) == wanted


def test_a_bare_op_has_the_schema_of_ours_and_goes_away():
    with bare_op(causal_conv1d_update) as bare:
        assert str(bare._schema).partition("(")[2] == str(causal_conv1d_update.overload._schema).partition("(")[2]
    assert not hasattr(torch.ops.mamba_ops_bare, causal_conv1d_update.name)


def test_an_idle_op_writes_nothing(device):
    sample = causal_conv1d_update.make_samples(device)[0]
    out = torch.full_like(sample.args[0], 7)
    with idle_backend(causal_conv1d_update):
        causal_conv1d_update(*sample.args, **sample.kwargs, out=out)
    assert (out == 7).all()


def test_calls_take_turns():
    turns = []
    times = us_per_call({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=3, number=2)
    assert "".join(turns) == "aabb" * 3
    assert all(time > 0 for time in times.values())


def test_the_boundary_is_measured(device):
    boundary = measure_boundary(device, rounds=3)
    assert boundary.ratio == boundary.front_us / boundary.bare_us > 0


def test_the_ladder_has_all_rungs_and_is_saved(tmp_path, capsys):
    arguments = ["--device", "cpu", "--rounds", "2", "--number", "2", "--json", str(tmp_path / "ladder.json")]
    assert ladder.main([*arguments, "--save", str(tmp_path)]) in (0, 1)  # too few repeats for a verdict
    saved = json.loads((tmp_path / "ladder.json").read_text())
    assert saved["us"].keys() == {"grad", "inference"}
    assert all(us.keys() == ladder.BASE_OF.keys() for us in saved["us"].values())
    [page] = tmp_path.glob("*_boundary.md")
    assert page.read_text() in capsys.readouterr().out
    assert ladder.FRONT in page.read_text()
    assert set(ops()) == NAMES  # the ladder's own op is gone


def test_the_front_costs_little(device):
    for _ in range(5):  # the best of five: another process may be in the way
        criteria = ladder.criteria(ladder.measure(device, rounds=60, number=60))
        if all(ratio <= limit for _, ratio, limit in criteria):
            return
    pytest.fail(str(criteria))


# -- the swap benchmark -----------------------------------------------------------------------------------------------


@pytest.mark.slow  # interpreted where there is no GPU
def test_the_swap_benchmark_tells_backends_apart_by_the_numbers(device):
    readings, watch, skips = swap.swap(device)
    torch._dynamo.reset()
    assert [reading.ran for reading in readings] == [[reading.asked] for reading in readings]
    assert (watch.graphs, watch.recompiles) == (1, 0)
    if device.type == "cuda":
        assert swap.problems(readings, watch, skips) == []


def test_the_swap_benchmark_finds_a_stale_replay():
    first = swap.Reading("triton", ["triton"], launches=8, recordings=1, difference=0)
    stale = swap.Reading("marker", ["triton"], launches=0, recordings=0, difference=0.5)
    with watch_compiler() as watch:
        found = swap.problems([first, stale, first], watch, skips=1)
    assert found == [
        "got 0 graphs and 0 recompiles, expected one and none",
        "Inductor gave up CUDA graphs 1 times, expected never",
        "reading 2: asked for marker, the numbers say triton",
        "reading 2: nothing was recorded, the first time on marker",
        "reading 3: 1 recordings and 8 launches, expected replays of the earlier recording",
    ]


def test_the_swap_benchmark_says_that_it_needs_a_gpu(device, capsys):
    if device.type == "cuda":
        pytest.skip("it runs here")
    assert swap.main() == 0
    assert capsys.readouterr().out == "benchmarks.swap needs a GPU with CUDA graphs; there is none here.\n"
