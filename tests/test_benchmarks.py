"""The benchmarks can be started, and those of engines and states do what their pages say, in small sizes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

import benchmarks
from benchmarks import serving_requests

MODULES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("[a-z]*.py"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MODULES)
def test_its_imports_are_there(name: str) -> None:
    pytest.importorskip("triton", reason="benchmarks are of kernels")
    importlib.import_module(f"benchmarks.{name}")


def test_requests_arrive_by_a_seed_and_begin_alike() -> None:
    sizes = serving_requests.SIZES["cpu"]
    work = serving_requests.requests_of(8, sizes)
    assert work == serving_requests.requests_of(8, sizes)
    assert [when for when, _ in work] == sorted(when for when, _ in work)
    assert len({tuple(prompt[: sizes["prefix"]]) for _, prompt in work}) <= serving_requests.PREFIXES


def test_times_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**serving_requests.SIZES["cpu"], "hidden": 32, "new": 3}
    monkeypatch.setitem(serving_requests.SIZES, "cpu", small)
    with Progress(disable=True) as progress:
        one, several = serving_requests.measure(CPU, ["torch"], progress, counts=(1, 6))
        assert progress.finished
    assert (one["requests"], several["requests"]) == (1, 6)
    assert one["found"] == 0
    assert several["found"] > 0
    for row in (one, several):
        assert 0 < row["first p50"] <= row["first p99"]
        assert 0 < row["between p50"] <= row["between p99"]
        assert row["launching"] + row["waiting"] + row["engine"] == pytest.approx(1)
        assert all(isinstance(cell(row), str) for cell in serving_requests.COLUMNS.values())
    json.dumps([one, several])


def test_prefixes_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import prefixes

    monkeypatch.setattr(prefixes, "microseconds", lambda call, device: 1.0)
    monkeypatch.setattr(
        sys, "argv", ["prefixes", "--device", "cpu", "--hidden", "64", "--json", str(tmp_path / "found")]
    )
    prefixes.main()
    found = json.loads((tmp_path / "found").read_text())
    assert found["microseconds"]["Mamba2"]["after a hit"] == 1.0
