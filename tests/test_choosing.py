"""`mamba-ops bench --choose`: what is timed, what is chosen, and what `BackendConfig.load` makes of the file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mamba_ops import BackendConfig, causal_conv1d, causal_conv1d_update, configure, explain, use_backend
from mamba_ops.cold_start import choosing
from mamba_ops.commands.cli import app
from mamba_ops.registry import Backend, ConfigError, record_selections

CPU = torch.device("cpu")
OPS = (causal_conv1d, causal_conv1d_update)
SIZES: dict[str, Any] = {"sizes": {"channels": 8}, "dtype": torch.float32, "state_dtype": torch.float32}


@pytest.fixture(autouse=True)
def other() -> Iterator[Backend]:
    """A second backend of two ops, which takes no 256 rows; the torch reference is the default."""
    made = Backend("other", devices=None, priority=-5)
    for op in OPS:
        refusal = lambda x: "takes no batch of 256" if x.shape[0] == 256 else None  # noqa: E731
        made.implements(op, unsupported=refusal)(op.kernels["torch"].function)
    yield made
    configure(None)
    made.remove()


def clock_of(other_us: float, *, torch_us: float = 10.0) -> Callable[..., float]:
    """A clock by which backends take so long, whatever they do; others take longer than both."""

    def clock(call: Callable[[], object], device: torch.device) -> float:
        with record_selections() as record:
            call()
        return {"torch": torch_us, "other": other_us}.get(record[-1].backend, 100.0)

    return clock


def chosen(other_us: float, *ops: Any) -> list[choosing.Choice]:
    steps: list[tuple[str, int, int]] = []
    found = choosing.choose(
        ops or [causal_conv1d], CPU, **SIZES, progress=lambda *step: steps.append(step), clock=clock_of(other_us)
    )
    assert [done for _, done, _ in steps] == list(range(steps[0][2] + 1))
    return found


@pytest.mark.parametrize(
    ("us", "order"), [(5.0, ("other", "torch")), (9.9, ("torch", "other")), (20.0, ("torch", "other"))]
)
def test_the_fastest_comes_first_and_the_default_stays_within_noise(us: float, order: tuple[str, ...]) -> None:
    [choice] = chosen(us)
    assert choice.order == order
    assert choice.us == {
        "one prompt of 4096 tokens": {"torch": 10.0, "other": us},
        "16 prompts of 512 tokens": {"torch": 10.0, "other": us},
    }


def test_what_refuses_a_size_comes_after_what_takes_all() -> None:
    [choice] = chosen(1.0, causal_conv1d_update)
    order = [name for name in choice.order if name != "cpp"]  # which there may be, too
    assert order == ["torch", "other"]
    assert choice.us["256 rows"].items() >= {"torch": 10.0, "other": "takes no batch of 256"}.items()
    assert choice.us["1 row"].items() >= {"torch": 10.0, "other": 1.0}.items()


def test_a_file_is_read_and_explained(tmp_path: Path) -> None:
    path = tmp_path / "chosen.json"
    choosing.write(path, chosen(2.5), CPU)
    call = torch.zeros(2, 3, 8), torch.zeros(8, 4)
    assert explain(causal_conv1d, *call).backend == "torch"  # nothing changes unasked
    config = BackendConfig.load(path, device="cpu")
    assert config == BackendConfig({"causal_conv1d": ["other", "torch"]}, device="cpu")
    for put in (configure, use_backend):
        block = put(config)
        with block or use_backend():
            found = explain(causal_conv1d, *call)
        assert found.backend == "other"
        why = f"{path}: fastest here: one prompt of 4096 tokens: 2.5 us, torch 10.0 us; 16 prompts of 512 tokens: 2.5"
        assert found.why is not None
        assert found.why.startswith(why)
        assert f"runs ({found.bound_by}; {why}" in str(found)
        configure(None)
    assert explain(causal_conv1d, *call).why is None
    assert explain(causal_conv1d_update, torch.zeros(2, 8), torch.zeros(2, 8, 3), torch.zeros(8, 4)).why is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", '{"kind": "another"}', '{"kind": "mamba-ops choices 1"}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(ConfigError, match=r"f: expected a file that mamba-ops bench --choose has written"):
        BackendConfig.load(tmp_path / "f")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "NVIDIA H200"}, r"c: got timings of NVIDIA H200, expected those of cpu \w+; run mamba-ops bench"),
        ({"order": {"causal_conv1d": ["others"]}}, r"c: order: .*others"),
        ({"order": 3}, "c: expected a file that mamba-ops bench"),
        ({"order": {"causal_conv1d": 3}}, "c: order: got 3 for causal_conv1d, expected names of backends"),
    ],
    ids=str,
)
def test_files_of_other_machines_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    choosing.write(tmp_path / "c", chosen(2.5), CPU)
    found = json.loads((tmp_path / "c").read_text())
    (tmp_path / "c").write_text(json.dumps(found | change))
    with pytest.raises(ConfigError, match=message):
        BackendConfig.load(tmp_path / "c", device="cpu")


def test_the_command_times_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "READS", {"a short prompt": (1, 8)})
    path = tmp_path / "chosen.json"
    options = ["bench", "--ops", "causal_conv1d", "--choose", str(path), "--size", "channels=4", "--device", "cpu"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "a short prompt" in result.output
    times = json.loads(path.read_text())["us"]["causal_conv1d"]["a short prompt"]
    assert times.keys() == {"torch", "other"}
    assert all(0 < us < 1e6 for us in times.values())
    assert BackendConfig.load(path, device="cpu").order.keys() == {"causal_conv1d"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "causal_conv", "--choose", "f"], "causal_conv1d"),
        (
            ["--ops", "mamba_chunk_scan", "--choose", "f"],
            "bench: op: got mamba_chunk_scan, expected one for which several backends run on cpu: torch",
        ),
        (["--ops", "causal_conv1d", "--choose", "f", "--size", "chanels=4"], "channels"),
        (
            ["--ops", "causal_conv1d", "--choose", "missing/folder/f"],
            "--choose: got missing/folder/f, expected a file in a folder",
        ),
        (["--choose", "f", "--dtype", "int8"], "--dtype: got 'int8', expected one of"),
    ],
    ids=str,
)
def test_wrong_usage_is_a_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments, "--device", "cpu"])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "choose", None)
    (tmp_path / "f.part").mkdir()
    options = ["bench", "--ops", "causal_conv1d", "--choose", str(tmp_path / "f"), "--device", "cpu"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert "f.part" in "".join(result.output.split())
