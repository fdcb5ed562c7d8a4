"""The command: what it prints, and that it answers wrong usage with a sentence and exit status 2."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer", reason="the command needs mamba-ops[cli]")

from typer.testing import CliRunner, Result

import mamba_ops
from benchmarks.idle_ops import does_nothing
from mamba_ops import causal_conv1d_update, use_backend
from mamba_ops.commands import ops_page
from mamba_ops.commands.cli import app
from mamba_ops.commands.compare.comparison import Comparison, Row
from mamba_ops.commands.demo import run as demo_run
from mamba_ops.commands.demo import show as demo_show
from mamba_ops.registry import Backend, backends, ops
from tests import fresh


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, arguments)


def python(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return fresh.run(["-c", code], env=os.environ | environment)


def test_backends_are_listed_with_their_reasons():
    result = run("backends", "--device", "cpu")
    assert result.exit_code == 0
    rows = [line.split() for line in result.output.splitlines()]
    assert ["op", *(backend.name for backend in backends()), "runs", "on"] in rows
    cells = {row[0]: row[1:] for row in rows if row}
    names = [backend.name for backend in backends()]
    listed = {name: op for name, op in ops().items() if not op.returns}
    assert len(listed) >= 10
    for name, op in listed.items():
        answers = dict(zip(names, cells[name], strict=False))
        assert answers["composed" if op.composed else "torch"] == "yes"
        assert answers["torch" if op.composed else "composed"] == "-"
        assert cells[name][-1] == ("composed" if op.composed else "torch")
    assert "Default order: " + ", ".join(f"{b.name} {b.priority}" for b in backends()) in result.output


@pytest.mark.parametrize("asked", ["", "torch:triton:flashinfer"])
def test_the_table_of_backends_fits_80_columns(asked, monkeypatch):
    monkeypatch.setenv("MAMBA_OPS_BACKEND", asked)
    lines = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["backends", "--device", "cpu"]).output.splitlines()
    names = [backend.name for backend in backends()]
    assert ["op", *names, "runs", "on"] in [line.split() for line in lines]
    known = sorted(op.name for op in ops().values() if not op.returns)
    assert [line.split()[0] for line in lines if line.startswith(" ") and line.strip("─ ")][1:] == known
    assert max(map(len, lines)) <= 80


def test_backends_of_every_device_here_are_listed_unasked(device):
    output = run("backends").output
    assert f"On {device}" in output
    assert "On cpu" in output


def test_the_reason_why_a_backend_does_not_run_is_printed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "triton: runs on cuda, xpu, not on cpu\n" in run("backends", "--device", "cpu").output
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton: only if asked for by name (runs on " in run("backends", "--device", "cpu").output


def test_what_to_install_is_printed():
    absent = Backend("absent", devices=None, requires="not_installed", install="mamba-ops[absent]", priority=-50)
    try:
        absent.implements(causal_conv1d_update)(does_nothing(causal_conv1d_update.parameters))
        output = run("backends", "--device", "cpu").output
    finally:
        absent.remove()
    assert "not_installed is not installed; pip install 'mamba-ops[absent]'" in output


def test_an_op_is_shown_by_name():
    output = run("ops", "selective_state_update").output
    assert "Advance the cached ssm_state of every row" in output
    assert "Takes no float64 x" in output
    assert run("ops", "causal_conv1d", "--markdown").output.startswith("## `causal_conv1d`")
    assert "there is no op 'scan'; ops: causal_conv1d," in run("ops", "scan").output


@pytest.mark.parametrize("arguments", [(), ("chunk_gated_delta_rule",)])
def test_ops_can_be_read_at_80_columns(arguments):
    output = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["ops", *arguments]).output
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output  # no name is cut
    assert not arguments or "chunk_gated_delta_rule(q, k, v, g, beta" in output
    for op in () if arguments else ops_page.own_ops():
        assert op.name in output.splitlines()
        assert f"mutates {', '.join(sorted(op.mutates - {'output'}))}"[:40] in " ".join(output.split())


def test_the_code_generated_for_an_op_is_printed():
    result = run("ops", "selective_state_update", "--source")
    assert result.exit_code == 0
    assert result.output == ops()["selective_state_update"].source_code()
    functions = [node.name for node in ast.walk(ast.parse(result.output)) if isinstance(node, ast.FunctionDef)]
    assert "__call__" in functions
    assert "num_accepted_tokens=None" in result.output
    assert "mamba-ops: --source needs the name of an op" in run("ops", "--source").output


def test_what_chose_the_backend_is_printed(monkeypatch):
    with use_backend("torch"):
        output = run("backends", "--device", "cpu").output
    assert "torch *" in output
    assert "\n*: asked for by use_backend\n" in output
    monkeypatch.delenv("MAMBA_OPS_BACKEND", raising=False)
    assert "MAMBA_OPS_BACKEND is not set" in run("backends").output
    monkeypatch.setenv("MAMBA_OPS_BACKEND", "torch")
    assert "MAMBA_OPS_BACKEND=torch is in force" in run("backends").output


def test_a_configuration_is_in_force_while_the_command_runs():
    result = run("backends", "--device", "cpu", "--backend", "causal_conv1d=torch,philox_rounds=6")
    assert result.exit_code == 0
    assert result.output.count("torch *") == 1
    assert result.output.splitlines()[-1] == "--backend causal_conv1d=torch,philox_rounds=6 is in force"
    assert "BackendConfig" not in run("backends", "--device", "cpu").output


@pytest.mark.parametrize("problems", [[], ["something recompiled"]])
def test_the_demo_reads_a_text_and_its_verdict_is_the_exit_status(monkeypatch, tmp_path, problems):
    text = tmp_path / "text"
    text.write_bytes(b"bytes")
    asked = {}

    def run_demo(read, *, progress, **options):
        progress("stock, eager")
        asked.update(options, text=read)
        return SimpleNamespace(problems=problems)

    monkeypatch.setattr(demo_run, "run_demo", run_demo)
    monkeypatch.setattr(demo_show, "show", lambda report, console: console.print("the report"))
    options = ("--backend", "copying", "--layers", "3", "--device", "cpu", "--cap", "9", "--checkpoint", str(tmp_path))
    result = run("demo", "--text", str(text), *options)
    assert result.exit_code == len(problems)
    assert "stock, eager ...\nthe report\n" in result.output
    cpu = torch.device("cpu")
    expected = {"text": b"bytes", "device": cpu, "swap_to": "copying", "layers": 3, "cap": 9, "checkpoint": tmp_path}
    assert asked == expected


ROW = Row("torch", None, 2.0, 1.0, 0.5, 0, {"torch": 4})


@pytest.mark.parametrize(("largest", "status"), [(1e3, 0), (1.0, 1)])
def test_a_comparison_is_shown_and_its_verdict_is_the_exit_status(monkeypatch, largest, status):
    asked = []

    def compare(target, names, *, progress, **options):
        asked.append((target, names, options))
        rows = (ROW, Row("other", refusal="takes no [z]"))
        return Comparison(rows, "a machine", calls=3, graphs=1, largest=largest)

    monkeypatch.setattr(sys.modules[Comparison.__module__], "compare", compare)
    result = run("compare", "file.py:make", "--backends", "torch, other", "--layers", "3", "--device", "cpu")
    assert result.exit_code == status
    assert asked == [("file.py:make", ["torch", "other"], {"device": torch.device("cpu"), "layers": 3})]
    assert "torch (4)" in result.output
    assert "refuses: takes no [z]" in result.output
    assert ("FAILED: torch: an output is 0.5 off" in result.output) == bool(status)


@pytest.mark.parametrize("command", ["compare", "warm-up"])
def test_an_error_of_the_users_is_shown_with_its_traceback(command, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def make():\n    return 1 / 0\n")
    result = run(command, f"{file}:make")
    assert result.exit_code == 2
    assert "return 1 / 0" in result.output
    assert "targets.py" not in result.output
    assert result.output.splitlines()[-1] == f"mamba-ops: {file}:make raised ZeroDivisionError"


def test_the_demo_without_transformers_names_the_extra():
    absent = "import sys; sys.modules['transformers'] = None; sys.argv[1:] = ['demo']"
    done = python(f"{absent}; from mamba_ops.commands.cli import main; main()")
    assert done.returncode == 2
    expected = "mamba-ops: transformers is not installed, and this needs it; pip install 'mamba-ops[transformers]'"
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["backends", "--device", "gpu0"], "'gpu0' is no device; devices here: "),
        (["backends", "--device", "meta"], "there is no meta here; devices here: "),
        (["demo", "--device", "cpu:7"], "there is no cpu:7 here; devices here: "),
        (["demo", "--layers", "0"], "--layers"),
        (["demo", "--checkpoint", "nowhere"], "'nowhere' does not exist"),
        (["demo", "--checkpoint", str(Path(__file__).parent)], "mamba-ops: there is no config.json in "),
        (["compare"], "TARGET"),
        (["compare", "nowhere"], "mamba-ops: got nowhere, expected package.module:factory"),
        (
            ["compare", "nowhere", "--backend", "tirton"],
            "mamba-ops: --backend: the configuration has a problem:\n  order: ",
        ),
        (["audit", "nowhere", "--backend", "tirton"], "unknown backend 'tirton'; valid: "),
        (["backends", "--backend", "philox_rounds=x"], "philox_rounds: got 'x', expected a number of rounds"),
        (["compare", "transformers:mamba2", "--backends", "nope"], "mamba-ops: unknown backend 'nope'; valid: "),
        (["demo", "--text", "nowhere"], "'nowhere' does not exist"),
        (["demo", "--backend", "nope"], "mamba-ops: unknown backend 'nope'; valid: "),
        (["demo", "--device", "cpu", "--backend", "torch"], "mamba-ops: torch runs here anyway"),
        (["audit", "nowhere", "--mode", "x"], "mamba-ops: --mode: got x, expected default, "),
        (["doctor", "--size", "dstate=16"], "mamba-ops: --size: got sizes without --target or --fit, expected one"),
        (["doctor", "--target", "sm_90", "--size", "nothing=1"], "mamba-ops: unknown size 'nothing'; valid: "),
        (
            ["warm-up", "causal_conv1d", "--device", "cpu", "--size", f"dim={2**40}"],
            f"dim: got {2**40}, expected",
        ),
        (["warm-up", "causal_conv1d", "--device", "cpu", "--export", "/dev/null/x"], "mamba-ops: [Errno "),
        (["nothing"], "nothing"),
    ],
)
def test_wrong_usage_is_answered_in_a_sentence(arguments, sentence):
    if arguments[0] == "demo" or "transformers:mamba2" in arguments:
        pytest.importorskip("transformers")
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_a_wrong_environment_is_answered_in_a_sentence():
    command = "import sys; sys.argv[1:] = ['backends']; from mamba_ops.commands.cli import main; main()"
    done = python(command, MAMBA_OPS_BACKEND="nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mamba-ops: MAMBA_OPS_BACKEND: unknown backend 'nope'; valid: ")


@pytest.mark.parametrize("missing", ["typer", "rich"])
@pytest.mark.parametrize(
    "start", ["import mamba_ops.commands.cli", "import runpy; runpy.run_module('mamba_ops', run_name='__main__')"]
)
def test_a_missing_extra_is_named(start, missing):
    done = python(f"import sys; sys.modules['{missing}'] = None; {start}")
    assert done.returncode == 2
    assert done.stderr == f"mamba-ops needs {missing}, which is not installed; pip install 'mamba-ops[cli]'\n"


def test_the_version_is_printed():
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"mamba-ops \d+\.\d+\.\d+\n", result.output)
    assert result.output.split()[1] == mamba_ops.__version__


def test_the_package_runs_as_the_command():
    done = fresh.run(["-m", "mamba_ops", "nothing"], env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 2
    assert "Usage: mamba-ops [OPTIONS] COMMAND" in done.stderr
    assert "No such command 'nothing'" in done.stderr


@pytest.mark.slow
def test_the_demo_runs_as_a_command():
    pytest.importorskip("transformers")
    result = run("demo", "--layers", "1", "--cap", "1")
    assert result.exit_code == 0, result.output
    assert "OK: one graph for all prompts" in result.output
