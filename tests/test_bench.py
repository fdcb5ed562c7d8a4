"""`mamba-ops bench`: what is checked, timed, left out, written."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mamba_ops import causal_conv1d_update
from mamba_ops.commands.bench import clocks, peers, run, show
from mamba_ops.commands.cli import app
from mamba_ops.ops._common.bench import TINY, Call, Calls, Case, NotTaken
from mamba_ops.ops.causal_conv1d_update.bench import case as conv_update
from mamba_ops.ops.mamba_chunk_scan.bench import case as chunk_scan
from mamba_ops.ops.selective_scan.bench import case as scan
from mamba_ops.registry import Backend, ops

CPU = torch.device("cpu")
OP = "causal_conv1d_update"
RATES = run.Rates(1e10, 1e11)
BUILDS = {OP: [lambda device: conv_update(3, device, scale=TINY)]}


def changed(change: Callable[[torch.Tensor, dict[str, torch.Tensor]], object]) -> Callable[[Case, Any], Call]:
    """A peer that does what the op does, and something more."""

    def arrange(case: Case, module: Any) -> Call:
        ours = case.ours()

        def call(caches: Any, slots: torch.Tensor) -> torch.Tensor:
            out = ours(caches, slots)
            change(out, caches)
            return out

        return call

    return arrange


def absent(case: Case, module: Any) -> Call:
    raise ImportError("no such project")


def picky(case: Case, module: Any) -> Call:
    raise NotTaken("takes no such case")


def broken(case: Case, module: Any) -> Call:
    def call(caches: Any, slots: torch.Tensor) -> torch.Tensor:
        raise TypeError("got an unexpected keyword argument 'slots'\nand more")

    return call


def changed_since(case: Case, module: Any) -> Call:
    raise AttributeError("module 'peer' has no attribute 'update'")


FAKES = {
    "right": changed(lambda out, caches: None),
    "wrong": changed(lambda out, caches: out.add_(0.3)),
    "nan": changed(lambda out, caches: out[:1].fill_(math.nan)),
    "nan in the state": changed(lambda out, caches: caches["conv_state"][..., 0].fill_(math.nan)),
    "wrong state": changed(lambda out, caches: caches["conv_state"].mul_(1.5)),
    "wandering": changed(lambda out, caches: caches["conv_state"][0].add_(1)),
    "unsteady": changed(lambda out, caches: out.mul_(1 + 1e-4 * torch.rand(()))),
    "absent": absent,
    "picky": picky,
    "broken": broken,
    "changed since": changed_since,
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The peers of one op; and how many calls of each were timed."""
    timed: dict[str, list[int]] = {}

    def counting(name: str, arrange: Callable[[Case, Any], Call]) -> Callable[[Case, Any], Calls]:
        def arranged(case: Case, module: Any) -> Calls:
            checked = arrange(case, module)

            def call(*arguments: Any) -> torch.Tensor:
                timed.setdefault(name, []).append(1)
                return checked(*arguments)

            return Calls(checked, call)

        return arranged

    fake = {name: counting(name, arrange) for name, arrange in FAKES.items()}
    monkeypatch.setattr(causal_conv1d_update, "bench_peers", fake)
    return timed


@pytest.fixture
def refusing() -> Iterator[Backend]:
    made = Backend("other", devices=None, priority=-5)
    made.implements(ops()[OP], unsupported=lambda x: "takes no batch of three" if x.shape[0] == 3 else None)(
        ops()[OP].kernels["torch"].function
    )
    yield made
    made.remove()


def found(**options: Any) -> run.Row:
    return {**run.run(BUILDS, CPU, rates=RATES, **options), "command": "mamba-ops bench", "host": []}


def test_what_is_wrong_is_reported_and_not_timed(fakes: dict[str, list[int]]) -> None:
    result = found(names=["torch"])
    [row] = result["rows"]
    by_name = {each["name"]: each for each in row["contestants"]}
    assert {name: each["status"] for name, each in by_name.items()} == {
        "torch": "timed",
        "right": "timed",
        "wrong": "wrong",
        "nan": "wrong",
        "nan in the state": "wrong",
        "wrong state": "wrong",
        "wandering": "wrong",
        "unsteady": "wrong",
        "absent": "absent",
        "picky": "refused",
        "broken": "failed",
        "changed since": "failed",
    }
    assert {name for name, each in by_name.items() if "us" in each} == {"torch", "right"}
    assert list(fakes) == ["right"]
    assert "relative error" in by_name["wrong"]["reason"]
    assert "slot that was not named" in by_name["wandering"]["reason"]
    assert re.fullmatch(r"two runs gave different bits: out in \d+ of 144 places", by_name["unsteady"]["reason"])
    for name in ("nan", "nan in the state"):
        assert by_name[name]["reason"].startswith("relative error nan"), "an error of another tensor hides it"
        assert by_name[name]["steady"], "a NaN has the same bits in every run"
    assert by_name["broken"]["reason"] == "TypeError: got an unexpected keyword argument 'slots'"
    assert by_name["right"]["error"] < 1e-6
    text = show.text(result)
    assert "WRONG" in text
    assert "wandering: wrote to a slot that was not named" in text
    assert "absent" not in text
    json.dumps(result, allow_nan=False)
    assert max(map(len, text.partition("Not timed:")[0].splitlines()[3:])) <= 80


def test_a_backend_that_refuses_is_told_and_the_others_are_timed(refusing: Backend) -> None:
    result = found(names=["torch", "other"])
    statuses = {each["name"]: each["status"] for each in result["rows"][0]["contestants"] if each["kind"] == "backend"}
    assert statuses == {"torch": "timed", "other": "refused"}
    assert f"{OP}, 3 rows, other: takes no batch of three" in show.text(result)


def test_all_take_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("one", "other")}  # type: ignore[misc]
    monkeypatch.setattr(clocks, "_host_clock", lambda _: lambda call: (call(), lambda: 7.0)[1])
    assert clocks.by_turns(calls, CPU, seconds=0) == {"one": 7.0, "other": 7.0}
    assert order == ["one", "other"] * clocks.LEAST


def test_the_median_of_turns_counts_and_a_slow_one_ends_first(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"fast": iter([1e3, *[10.0] * 1000]), "slow": iter([1e6] * 1000)}
    turns: list[str] = []

    def clock(call: Callable[[], str]) -> Callable[[], float]:
        turns.append(call())
        return lambda: next(times[turns[-1]]) if False else next(times[call()])

    monkeypatch.setattr(clocks, "_host_clock", lambda _: clock)
    measured = clocks.by_turns({"fast": lambda: "fast", "slow": lambda: "slow"}, CPU, seconds=0.2)
    assert measured == {"fast": 10.0, "slow": 1e6}
    assert turns.count("slow") == clocks.LEAST
    assert turns.count("fast") == clocks.MOST


def test_the_floor_is_the_slowest_of_what_must_be_done() -> None:
    case = scan((64,), CPU, scale=TINY)
    assert run.Rates(1e9, 1e9, 1e3).floor(case) == (1e3 * case.exponentials, "exponentials")
    assert run.Rates(1e3, 1e12, 1e12).floor(case) == (1e3 * case.bytes, "bytes")
    assert run.Rates(1e3).floor(case)[1] == "bytes"
    assert run.Rates(1e12, 1e3).floor(chunk_scan(64, 1, CPU))[1] == "products"


def test_a_limit_ends_it_and_says_so() -> None:
    result = found(late=lambda: True)
    assert not result["finished"]
    assert result["rows"] == []
    assert "The limit, or an interruption, came first" in show.text(result)


def test_an_interrupted_run_keeps_what_it_found() -> None:
    def interrupted(device: torch.device) -> Any:
        raise KeyboardInterrupt

    result = run.run({OP: [BUILDS[OP][0], interrupted, BUILDS[OP][0]]}, CPU, names=["torch"], rates=RATES)
    assert [row["case"] for row in result["rows"]] == [BUILDS[OP][0](CPU).name]
    assert not result["finished"]
    assert "interruption" in show.text({**result, "host": [], "command": ""})


def test_a_case_that_cannot_be_made_does_not_end_the_run() -> None:
    def build(device: torch.device) -> Case:
        raise torch.OutOfMemoryError("tried to allocate\nmore")

    steps: list[tuple[str, int, int]] = []
    result = run.run({OP: [build, *BUILDS[OP]]}, CPU, rates=RATES, progress=lambda *step: steps.append(step))
    first, second = result["rows"]
    assert first["failed"] == "tried to allocate"
    assert any("us" in each for each in second["contestants"])
    assert steps == [(OP, 0, 2), (OP, 1, 2), (OP, 2, 2)]
    assert "FAILED" in show.text({**result, "host": [], "command": ""})


SCHEMA: dict[str, Any] = {
    "kind": str,
    "date": str,
    "device": str,
    "device_type": str,
    "threads": int,
    "command": str,
    "versions": dict,
    "rates": dict,
    "finished": bool,
    "without_case": list,
    "host": list,
    "rows": [
        {
            "op": str,
            "case": str,
            "bytes": int,
            "floor_us": float,
            "bound": str,
            "contestants": [
                {"name": str, "kind": str, "status": str, "us": (float, "?"), "error": (float, "?"),
                 "steady": (bool, "?"), "reason": (str, "?")}
            ],
        }
    ],
}  # fmt: skip


def check_schema(value: Any, schema: Any) -> None:
    if isinstance(schema, list):
        for each in value:
            check_schema(each, schema[0])
    elif isinstance(schema, dict):
        assert value.keys() <= schema.keys()
        assert value.keys() >= {name for name, kind in schema.items() if not isinstance(kind, tuple)}
        for name, each in value.items():
            check_schema(each, schema[name])
    else:
        assert isinstance(value, schema[0] if isinstance(schema, tuple) else schema)


def test_the_command_writes_figures_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "cases_of", lambda device: BUILDS)
    monkeypatch.setattr(run.Rates, "of", lambda device: RATES)
    folder = tmp_path / "figures"
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["bench", "--device", "cpu", "--output", str(folder)])
    assert result.exit_code == 0, result.output
    assert "floor (bytes)" in result.output
    figures = json.loads((folder / "bench.json").read_text())
    check_schema(figures, SCHEMA)
    assert figures["kind"] == run.KIND
    assert figures["finished"]
    assert figures["versions"].keys() >= {"mamba_ops", "torch", "triton", "python", *peers.PACKAGES}
    assert "gdn_mixing" in figures["without_case"]
    assert any(each["name"] == "torch" for each in figures["rows"][0]["contestants"])
    assert (folder / "bench.txt").read_text() == show.text(figures)
    assert (folder / "bench.md").read_text() == show.page(figures)
    pytest.importorskip("matplotlib")
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_library_that_does_not_load_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str) -> ModuleType:
        raise OSError("libcuda.so: no such file\nand more")

    monkeypatch.setattr(peers, "module", module)
    assert peers.versions() == dict.fromkeys(peers.PACKAGES, "absent (libcuda.so: no such file)")


def test_what_cannot_be_captured_is_timed_as_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(clocks, "captured", captured)
    other = Backend("other", devices=None, priority=-5)
    other.implements(ops()[OP])(ops()[OP].kernels["torch"].function)
    try:
        [row] = found(names=["other"])["rows"]
    finally:
        other.remove()
    assert [each["status"] for each in row["contestants"] if each["kind"] == "backend"] == ["timed"]


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plot(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(show, "plot", plot)
    assert [path.name for path in show.write(found(), tmp_path)] == ["bench.json", "bench.txt", "bench.md"]
    monkeypatch.setattr(run, "cases_of", lambda device: BUILDS)
    monkeypatch.setattr(run.Rates, "of", lambda device: RATES)
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--output", str(tmp_path / "figures")])
    assert "pip install 'mamba-ops[plot]'" in result.output


def test_a_backend_of_ours_that_is_wrong_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Backend("bad", devices=None, priority=-5)
    try:

        @bad.implements(ops()[OP])
        def wrong(call: Any) -> None:
            ops()[OP].kernels["torch"].function(**call._asdict())
            call.output.add_(1)

        monkeypatch.setattr(run, "cases_of", lambda device: BUILDS)
        monkeypatch.setattr(run.Rates, "of", lambda device: RATES)
        result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--backends", "bad"])
    finally:
        bad.remove()
    assert result.exit_code == 1
    assert "gave wrong numbers" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ops", "causal_conv"], "causal_conv1d"),
        (["--ops", "gdn_mixing"], "--ops: got gdn_mixing, expected one that has a case: causal_conv1d, causal_conv"),
        (["--backends", "tritom"], "triton"),
        (["--output", "missing/folder/f"], "--output: got missing/folder/f, expected a folder in one that exists"),
        (["--host"], "--host: got the device cpu, expected a GPU"),
        (["--size", "dstate=3"], "--size and --dtype: expected them with --choose"),
        (["--choose", "f", "--host"], "expected it alone"),
    ],
    ids=str,
)
def test_wrong_usage_is_a_sentence(options: list[str], message: str) -> None:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["bench", *options, "--device", "cpu"])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
