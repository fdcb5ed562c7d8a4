"""The demo as data, the tools it shares with the benchmarks, and the benchmarks that need no GPU."""

import contextlib
import dataclasses
import inspect
import json
import math
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("rich", reason="the benchmarks and the demo's report are shown with it")
pytest.importorskip("transformers", reason="the demo runs its Mamba-2")

from rich.console import Console

from benchmarks import boundary as ladder
from benchmarks import compile_time, swap, tokens
from benchmarks.idle_ops import bare_op, does_nothing, idle_backend, us_per_call
from mamba_ops import causal_conv1d_update, selective_state_update, use_backend
from mamba_ops.commands.demo import run
from mamba_ops.commands.demo.copying import copying_backend
from mamba_ops.commands.demo.decode import decode
from mamba_ops.commands.demo.prefill import Job, MeasurementError, Prefill, measure, measure_in_child
from mamba_ops.commands.demo.show import compile_ratio, prefill_table, show
from mamba_ops.commands.targets import TargetError, transformers_model
from mamba_ops.commands.watch import watch_compiler
from mamba_ops.registry import Backend, NoBackendError, UnknownNameError, ops
from mamba_ops.testing.judge import results, with_output

OPS = [causal_conv1d_update, selective_state_update]
TEXT = list(b"A state space model reads one byte after another and forgets some of them.")
NAMES = set(ops())
SMALL = {"layers": 1, "width": 32}
OURS = Prefill((512, 300), (6.0, 0.0), 5e4, 4e4, graphs=1, compiles=1, difference=1e-6, largest_logit=5.0)
STOPPED = Prefill((512, 300), (), 2e4, largest_logit=5.0, stopped_after_s=60.0)


@contextlib.contextmanager
def compiling_without_inductor():
    """Compile in a second: what is looked at is what is counted. Never around the swap benchmark, which is about what
    Inductor records."""
    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda *args, **options: compile(*args, **{**options, "backend": "eager"}))
        yield
    torch._dynamo.reset()


@pytest.fixture
def without_inductor():
    with compiling_without_inductor():
        yield


# -- prompts ----------------------------------------------------------------------------------------------------------


def small_job(device: torch.device, *, ours: bool = True) -> Job:
    return Job("mamba2", [TEXT[:21], TEXT[:34]], str(device), ours, **SMALL)


@pytest.mark.usefixtures("fresh_dynamo", "without_inductor")
def test_prompts_are_one_graph(device):
    steps, reports = [], []
    measure(small_job(device), steps.append, reports.append)
    before, first, last = reports
    assert (before.compile_s, before.graphs, before.lengths) == ((), 0, (21, 34))
    assert last.compile_s == (*first.compile_s, 0.0)
    assert (last.graphs, last.compiles) == (1, 1)
    assert 0 < last.difference < 1e-4 * last.largest_logit
    assert min(last.eager_tokens_per_s, last.compiled_tokens_per_s) > 0
    assert steps[-2:] == ["compiling for 21 tokens", "compiling for 34 tokens"]


@pytest.mark.slow
def test_a_child_is_stopped_when_its_time_is_over(device, tmp_path):
    steps = []
    stock = dataclasses.replace(small_job(device, ours=False), layers=8)
    measured = measure_in_child(stock, steps.append, cache=tmp_path, cap=0.5)
    assert measured.stopped_after_s == measured.total_compile_s == 0.5
    assert measured.compile_s == ()
    assert measured.eager_tokens_per_s > 0
    assert steps[0] == "stock, eager"


@pytest.mark.slow
def test_what_a_child_refuses_is_raised(tmp_path, device):
    with pytest.raises(TargetError, match="got nothing, expected mamba2, or a folder with a checkpoint"):
        measure_in_child(dataclasses.replace(small_job(device), model="nothing"), print, cache=tmp_path)


@pytest.mark.slow
def test_a_child_that_fails_is_quoted(tmp_path):
    broken = Job("mamba2", [[999]], "cpu", True, **SMALL)  # there are 256 tokens
    with pytest.raises(MeasurementError, match=r"(?s)ours: the child process ended with 1\n.*IndexError"):
        measure_in_child(broken, print, cache=tmp_path)


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoding(device):
    model = transformers_model("mamba2", device, **SMALL)
    with compiling_without_inductor():
        return decode(model, TEXT, 8, swap_to=None, progress=lambda step: None, device=device)


def test_the_backend_changes_in_the_middle(decoding):
    runs, other = decoding
    stock, eager, compiled, swapped = (run.kernel_calls for run in runs)
    [default] = eager
    assert not stock
    assert eager == compiled == {default: 16}  # 1 layer of 2 ops: the prompt, then 7 steps
    assert swapped == {default: 10, other: 6}


def test_one_graph_serves_both_compiled_runs_and_the_text_is_unchanged(decoding):
    runs, _ = decoding
    assert [(run.graphs, run.recompiles) for run in runs] == [(0, 0), (0, 0), (1, 0), (1, 0)]
    assert {run.tokens for run in runs} == {runs[0].tokens}
    assert len(set(runs[0].tokens)) > 1


def decode_with(backend: str, device: torch.device) -> None:
    model = transformers_model("mamba2", device, **SMALL)
    decode(model, TEXT, 4, swap_to=backend, progress=lambda step: None, device=device)


def test_a_swap_to_what_runs_anyway_is_refused(device, decoding):
    [default] = decoding[0][1].kernel_calls
    with pytest.raises(TargetError, match=f"{default} runs here anyway, expected a backend to swap to: .*copying"):
        decode_with(default.upper(), device)


def test_an_unknown_backend_is_refused(device):
    with pytest.raises(UnknownNameError, match=r"unknown backend 'nope'; valid: .*copying, .*torch"):
        decode_with("nope", device)


def test_a_backend_that_refuses_is_not_compiled_for(device):
    picky = Backend("picky", devices=None, priority=-50)
    before = counters["stats"]["unique_graphs"]
    try:
        kernel = does_nothing(causal_conv1d_update.parameters)
        picky.implements(causal_conv1d_update, unsupported=lambda x: "never does")(kernel)
        with pytest.raises(NoBackendError, match="picky  never does"):
            decode_with("picky", device)
        assert counters["stats"]["unique_graphs"] == before
    finally:
        picky.remove()


def test_the_demo_leaves_nothing_behind(decoding):
    assert {name for op in OPS for name in op.kernels}.isdisjoint({"copying", "idle"})
    assert set(ops()) == NAMES


# -- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def report(decoding):
    return run.DemoReport("a model", "a machine", STOPPED, OURS, tuple(decoding[0]), decoding[1])


def shown(report: run.DemoReport) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        show(report, console)
    return capture.get()


def test_a_report_is_shown_with_its_verdict(report):
    text = shown(report)
    assert report.problems == []
    assert "stopped after 60 s" in text
    assert "not reached" in text
    assert f"{report.swap_to} (6)" in text
    assert text.splitlines()[-1].startswith("OK: one graph for all prompts, compiled in more than 10.0x less time")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"graphs": 2, "compiles": 2}, "ours: 2 graphs in 2 compiles, expected 1 in 1"),
        ({"difference": math.nan}, "ours: a logit is nan off, expected at most 0.0005"),
    ],
)
def test_a_report_says_what_is_wrong_with_the_prompts(report, change, sentence):
    wrong = dataclasses.replace(report, ours=dataclasses.replace(OURS, **change))
    assert wrong.problems == [sentence]
    assert "FAILED: " + sentence in shown(wrong)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"graphs": 2}, "decoding: 2 graphs and 0 recompiles, expected 1 and none"),
        ({"recompiles": 3}, "decoding: 1 graphs and 3 recompiles, expected 1 and none"),
        ({"kernel_calls": {"torch": 16}}, "swapped half way: ran on torch, expected two"),
        ({"tokens": (999,) * 8}, "swapped half way: 0 of 8 tokens are those of stock, expected all"),
    ],
)
def test_a_report_says_what_is_wrong_with_the_decoding(report, change, sentence):
    last = dataclasses.replace(report.decoding[-1], **change)
    [problem] = dataclasses.replace(report, decoding=(*report.decoding[:-1], last)).problems
    assert problem.startswith(sentence)


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(TargetError, match="got a text of 3 tokens, expected at least 1024"):
        run.run_demo(b"abc", layers=1)


def test_the_default_text_is_the_readme(monkeypatch, tmp_path):
    assert run.read_text().startswith(b"# mamba-ops")
    monkeypatch.setattr(
        run, "__file__", str(tmp_path / "mamba_ops" / "commands" / "demo" / "run.py")
    )  # as in site-packages
    try:
        version("mamba-ops")
    except PackageNotFoundError:
        with pytest.raises(TargetError, match="name a file"):
            run.read_text()
    else:
        assert run.read_text().startswith(b"# mamba-ops")


# -- its second backend, and its watch --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_it_computes_what_the_reference_does_in_memory_of_its_own(device, op):
    with torch.no_grad(), copying_backend():
        for sample in op.make_samples(device):
            copied, expected = with_output(op, sample).clone(), with_output(op, sample).clone()
            with use_backend("copying"):
                op(*copied.args, **copied.kwargs)
            with use_backend("torch"):
                op(*expected.args, **expected.kwargs)
            for name, result in results(op, expected).items():
                assert torch.equal(results(op, copied)[name], result), (sample.name, name)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_watch_counts_graphs_and_recompiles():
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with watch_compiler() as watch:
        compiled(torch.zeros(2))
        assert (watch.graphs, watch.compiles, watch.recompiles) == (1, 1, 0)
        compiled(torch.zeros(3))
        assert (watch.graphs, watch.compiles, watch.recompiles) == (2, 2, 1)


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


@pytest.mark.parametrize("benchmark", [swap, tokens], ids=["swap", "tokens"])
def test_benchmarks_of_swaps_say_that_they_need_a_gpu(benchmark, device, capsys, monkeypatch):
    if device.type == "cuda":
        pytest.skip("it runs here")
    monkeypatch.setattr("sys.argv", ["benchmark"])
    assert benchmark.main() == 0
    name = benchmark.__name__
    assert capsys.readouterr().out == f"{name} needs a GPU with CUDA graphs; there is none here.\n"


def test_the_model_of_the_token_benchmark_is_what_it_says():
    model = tokens.decoder(2, 1, torch.device("cpu"))
    [layer] = model.layers
    assert (layer.ssm_state.shape, layer.ssm_state.dtype) == ((2, 48, 64, 128), torch.float32)
    assert layer.conv_state.dtype == layer.D.dtype == torch.bfloat16
    with torch.no_grad():
        assert tokens.why_not(model, "torch") is None
        assert tokens.why_not(model, "triton") in (None, "runs on cuda, xpu, not on cpu")


# -- the compile-time benchmark ---------------------------------------------------------------------------------------


def test_a_ratio_against_what_was_stopped_is_a_lower_bound(monkeypatch, tmp_path, capsys):
    jobs = []

    def measure_in_child(job, progress, *, cache, cap=None):
        jobs.append((job.ours, len(job.prompts), job.layers, cap))
        return OURS if job.ours else STOPPED

    monkeypatch.setattr(compile_time, "measure_in_child", measure_in_child)
    assert compile_time.main(["--cap", "60", "--layers", "3", "--save", str(tmp_path)]) == 0
    assert jobs == [(True, 5, 3, None), (False, 5, 3, 60.0)]
    [page] = tmp_path.glob("*_compile_time.md")
    assert "compiled in more than 10.0x less time than stock" in page.read_text()
    assert page.read_text() in capsys.readouterr().out


def test_stock_that_was_stopped_early_is_no_slower():
    early = dataclasses.replace(STOPPED, stopped_after_s=2.0)
    assert compile_ratio(early, OURS) == "and stock was stopped too early to compare"


def test_the_table_says_what_was_measured():
    console = Console(width=200)
    with console.capture() as capture:
        console.print(prefill_table(dataclasses.replace(OURS, compile_s=(70.0, 80.0)), OURS))
    assert "70.0 s" in capture.get()
    assert "150.0 s" in capture.get()
    assert "stopped" not in capture.get()
