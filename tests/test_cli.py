"""The command: what it prints, and that it answers wrong usage with a sentence and exit status 2."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="the command needs mamba-ops[cli]")

from typer.testing import CliRunner, Result

from mamba_ops import causal_conv1d_update, demo, use_backend
from mamba_ops.cli import app
from mamba_ops.demo.boundary import does_nothing
from mamba_ops.registry import Backend, backends, ops


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)


def test_backends_are_listed_with_their_reasons():
    result = run("backends", "--device", "cpu")
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in result.output.splitlines()]
    assert ["op", *(backend.name for backend in backends()), "runs on"] in rows
    cells = {row[0]: row[1:] for row in rows if row}
    assert all(cells[name][-2:] == ["yes", "torch"] for name in ops())
    assert "Default order: " + ", ".join(f"{b.name} {b.priority}" for b in backends()) in result.output


def test_backends_of_every_device_here_are_listed_unasked(device):
    output = run("backends").output
    assert f"On {device}" in output
    assert "On cpu" in output


def test_why_a_backend_does_not_run_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "runs on cuda, xpu, not on cpu" in run("backends", "--device", "cpu").output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "if asked for by name" in run("backends", "--device", "cpu").output


def test_what_to_install_is_said():
    absent = Backend("absent", devices=None, requires="not_installed", install="mamba-ops[absent]", priority=-50)
    try:
        absent.implements(causal_conv1d_update)(does_nothing(causal_conv1d_update.parameters))
        output = run("backends", "--device", "cpu").output
    finally:
        absent.remove()
    assert "not_installed is not installed; pip install 'mamba-ops[absent]'" in output
    assert "has no kernel" in output


def test_who_chose_the_backend_is_said(monkeypatch):
    with use_backend("torch"):
        assert "torch (use_backend)" in run("backends", "--device", "cpu").output
    monkeypatch.delenv("MAMBA_OPS_BACKEND", raising=False)
    assert "MAMBA_OPS_BACKEND is not set" in run("backends").output
    monkeypatch.setenv("MAMBA_OPS_BACKEND", "torch")
    assert "MAMBA_OPS_BACKEND=torch is in force" in run("backends").output


@pytest.mark.parametrize("problems", [[], ["something recompiled"]])
def test_the_demo_reads_a_text_and_its_verdict_is_the_exit_status(monkeypatch, tmp_path, problems):
    text = tmp_path / "text"
    text.write_bytes(b"bytes")
    asked = {}

    def run_demo(read, *, track, **options):
        asked.update(options, text=read, steps=list(track(range(3), "eager")))
        return SimpleNamespace(problems=problems)

    monkeypatch.setattr(demo, "run_demo", run_demo)
    monkeypatch.setattr(demo, "show", lambda report, console: console.print("the report"))
    result = run("demo", "--text", str(text), "--backend", "loop", "--device", "cpu", "--tokens", "9")
    assert result.exit_code == len(problems)
    assert "eager" in result.output  # the progress bar
    assert "the report" in result.output
    cpu = torch.device("cpu")
    assert asked == {"text": b"bytes", "device": cpu, "swap_to": "loop", "tokens": 9, "steps": [0, 1, 2]}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["backends", "--device", "gpu0"], "'gpu0' is no device; devices here: "),
        (["backends", "--device", "meta"], "there is no meta here; devices here: "),
        (["demo", "--device", "cpu:7"], "there is no cpu:7 here; devices here: "),
        (["demo", "--tokens", "3"], "--tokens"),
        (["demo", "--text", "nowhere"], "'nowhere' does not exist"),
        (["demo", "--backend", "nope"], "mamba-ops: unknown backend 'nope'; valid: "),
        (["demo", "--device", "cpu", "--backend", "torch"], "mamba-ops: torch runs here anyway"),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_usage_is_answered_in_a_sentence(arguments, sentence):
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_a_wrong_environment_is_answered_in_a_sentence():
    command = "import sys; sys.argv[1:] = ['backends']; from mamba_ops.cli import main; main()"
    done = python(command, MAMBA_OPS_BACKEND="nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mamba-ops: MAMBA_OPS_BACKEND: unknown backend 'nope'; valid: ")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named(missing):
    done = python(f"import sys; sys.modules['{missing}'] = None; import mamba_ops.cli")
    assert done.returncode == 2
    assert done.stderr == f"mamba-ops needs {missing}, which is not installed; pip install 'mamba-ops[cli]'\n"


def test_the_version_is_printed():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("mamba-ops")


@pytest.mark.slow
def test_the_demo_runs_as_a_command():
    result = run("demo", "--tokens", "4")
    assert result.exit_code == 0, result.output
    assert "OK: one graph, no recompile" in result.output
