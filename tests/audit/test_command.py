"""The command: its options, its exit status, and what it says of bad targets."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
import typer
from typer.testing import CliRunner

from mamba_ops.audit.report import Report
from mamba_ops.commands.audit.command import audit
from tests import fresh

ROOT = Path(__file__).parents[2]
app = typer.Typer(add_completion=False)
app.command("audit", context_settings={"ignore_unknown_options": True})(audit)  # as mamba_ops.commands.cli does

MODEL = """
import torch

class Net(torch.nn.Module):
    def forward(self, x):
        y = x * 2
        if y.sum() > 0:
            return y
        return -y

class Clean(torch.nn.Module):
    def forward(self, x):
        return x * 2

class Fails(torch.nn.Module):
    def forward(self, x):
        return x @ torch.ones(3, 3)

def net(): return Net(), torch.ones(4, 8)
def clean(): return Clean(), torch.ones(4, 8)
def fails(): return Fails(), torch.ones(4, 8)
class Fits(torch.nn.Module):
    def forward(self, x):
        return x @ torch.ones(8, 3)

def fits(): return Fits(), torch.ones(4, 8)
def wrong(): return 3
def late(): import nothing_of_that_name
def talks():
    print("{ hello")
    return Clean(), torch.ones(4, 8)
"""


@pytest.fixture
def run(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(MODEL)

    def run(target, *options):
        sys.modules.pop("theirs", None)
        arguments = [target.replace("theirs.py", str(file)), "--no-try"]
        return CliRunner().invoke(app, [*arguments, *options])

    return run


def test_a_break_is_shown_with_its_line_and_fails_on_request(run, tmp_path):
    result = run("theirs.py:net")
    assert result.exit_code == 0
    assert "theirs.py:7 in forward" in result.output.replace("\n", "")
    assert run("theirs.py:net", "--fail-on", "break").exit_code == 1
    assert run("theirs.py:net", "--fail-on", "capture,jit").exit_code == 0
    assert run("theirs.py:clean", "--fail-on", "break,recompile").exit_code == 0


@pytest.mark.slow
def test_who_asks_for_copies_has_them_looked_for(tmp_path):
    file = tmp_path / "made.py"
    file.write_text(
        "from compile_tests.planted import breaks, ops\n"
        "def bad(): return ops.CacheInPlaceOnView(), breaks.x()\n"
        "def twin(): return ops.CacheTwin(), breaks.x()\n"
    )
    for factory, status in (("bad", 1), ("twin", 0)):
        result = CliRunner().invoke(app, [f"{file}:{factory}", "--fail-on", "copy", "--no-try"])
        assert result.exit_code == status, result.output


def test_json_html_and_comparison(run, tmp_path):
    file, html = tmp_path / "report.json", tmp_path / "report.html"
    assert run("theirs.py:net", "--json", str(file), "--html", str(html)).exit_code == 0
    report = Report.from_json(file.read_text())
    assert [f.cause for f in report.findings] == ["branch"]
    assert "y.sum()" in html.read_text()
    result = run("theirs.py:clean", "--compare", str(file))
    assert "gone" in result.output


def test_shapes_make_calls(run):
    result = run("theirs.py:talks", "--shapes", "2x8,3x8,5x8", "--json", "-")
    report = json.loads(result.stdout)  # what the model prints goes elsewhere
    assert [row["shapes"] for row in report["calls"]] == ["2x8", "3x8", "5x8"]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("theirs.py:wrong", (), "expected (model, inputs)"),
        ("theirs.py:fails", (), "the model raised RuntimeError without the compiler"),
        ("theirs.py:fits", ("--shapes", "4x8,4x9"), "raised RuntimeError without the compiler, called with 4x9"),
        ("theirs.py:late", (), "theirs.py:late raised ModuleNotFoundError"),
        ("theirs.py:nobody", (), "has no function nobody"),
        ("nowhere.py:net", (), "there is no file nowhere.py"),
        ("theirs.py:net", ("--shapes", "2by3"), "expected sizes such as"),
        ("theirs.py:net", ("--fail-on", "rain"), "expected some of break"),
        ("theirs.py:net", ("--fail-on", "new"), "expected --compare OTHER.json with it"),
        ("theirs.py:net", ("--device", "toaster"), "expected cpu, cuda or xpu"),
        ("theirs.py:net", ("--layers", "3"), "--layers, --full and --ours are for transformers:NAME alone"),
    ],
)
def test_bad_targets(run, target, options, said):
    result = run(target, *options)
    assert result.exit_code == 2
    assert said in result.output


def test_the_users_error_comes_with_their_traceback(run, capfd):
    result = run("theirs.py:fails")
    assert result.exit_code == 2
    said = result.output + capfd.readouterr().err
    assert "return x @ torch.ones(3, 3)" in said
    assert "mamba_ops/" not in said  # theirs alone
    assert "torch/nn/modules" not in said


def test_what_was_known_before_a_call_failed_is_shown(run):
    result = run("theirs.py:fits", "--shapes", "4x8,5x8,4x9")
    assert result.exit_code == 2
    assert "recompile/size: x.shape[0]" in result.output


def test_a_script_is_watched(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(
        "import sys, torch\n"
        "def f(x):\n"
        "    y = x * float(sys.argv[1])\n"
        "    return y * y.sum().item()\n"
        "if __name__ == '__main__':\n"
        "    torch.compile(f, backend='aot_eager')(torch.ones(3))\n"
    )
    result = CliRunner().invoke(app, ["--run", str(script), "3", "--lr", "0.1", "--fail-on", "break"])
    assert result.exit_code == 1, result.output
    assert "loop.py:4 in f" in result.output.replace("\n", "")


def test_gradients_of_an_absent_device_are_refused(run):
    import torch

    absent = next(name for name in ("xpu", "cuda") if not torch.get_device_module(name).is_available())
    result = run("theirs.py:net", "--device", absent, "--train")
    assert result.exit_code == 2
    assert "is not present on this machine" in result.output


def test_a_script_says_for_itself_what_it_compiles(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text("raise SystemExit(3)")
    assert "the script says the rest" in CliRunner().invoke(app, ["--run", str(script), "--shapes", "1x2"]).output
    result = CliRunner().invoke(app, ["--run", str(script)])
    assert result.exit_code == 2
    assert "ended with status 3" in result.output
    assert "Nothing was compiled." in result.output


SLOW = """
import torch

class Slow(torch.nn.Module):
    def forward(self, x):
        y = x * 2
        if y.sum() > 1000:
            return y
        for i in range(20_000):
            y = (y + i).sin()
        return y

def make(): return Slow(), torch.ones(4, 8)
"""


@pytest.mark.slow
def test_after_the_limit_it_shows_what_is_known(tmp_path):
    file = tmp_path / "endless.py"
    file.write_text(SLOW)
    result = CliRunner().invoke(app, [f"{file}:make", "--limit", "30"])
    assert result.exit_code == 130
    assert "Interrupted. Found by then: 1 graph break." in result.output
    assert f"{file}:make was ended at the limit of 30 s." in result.output


HANGS = """
import signal, time

def hang():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(600)

def make():
    import torch
    model = torch.nn.Linear(8, 8)
    torch.nn.Linear.forward = lambda self, x: hang()
    return model, torch.ones(4, 8)

if __name__ == "__main__":
    hang()
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked here")
@pytest.mark.parametrize("options", [["{file}:make"], ["--run", "{file}"]], ids=["model", "script"])
def test_what_hangs_with_signals_blocked_is_ended_at_the_limit(tmp_path, options):
    file = tmp_path / "hangs.py"
    file.write_text(HANGS)
    options = [option.format(file=file) for option in options]
    begin = time.monotonic()
    result = CliRunner().invoke(app, [*options, "--limit", "1"])
    assert time.monotonic() - begin < 300  # it would hang for 600 s
    assert result.exit_code == 130
    assert f"{options[-1]} was ended at the limit of 1 s." in result.output


@pytest.mark.slow
def test_in_time_a_child_says_what_this_process_would_say(tmp_path):
    """Of a model that fails, of a script's own arguments, output and status."""
    file = tmp_path / "made.py"
    file.write_text(MODEL)
    result = CliRunner().invoke(app, [f"{file}:net", "--limit", "500", "--fail-on", "break", "--no-try"])
    assert result.exit_code == 1
    assert f"{file}:7 in forward" in result.output.replace("\n", "")
    assert CliRunner().invoke(app, [f"{file}:fails", "--limit", "500"]).exit_code == 2
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    done = fresh.run(["-m", "mamba_ops", "audit", "--limit", "500", "--run", script, "a", "--b"], cwd=ROOT)
    assert done.returncode == 2
    assert "['a', '--b']" in done.stdout
    assert f"{script} ended with status 3" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "absent"])
def test_ctrl_c_shows_what_is_known(tmp_path, device):
    import torch

    if device == "absent":
        device = next(kind for kind in ("cuda", "xpu") if not torch.get_device_module(kind).is_available())
    file, report = tmp_path / "endless.py", tmp_path / "report.json"
    file.write_text(SLOW.replace("y.sum() > 1000", "x is None"))
    command = [sys.executable, "-c", "from mamba_ops.commands.cli import main; main()", "audit", f"{file}:make"]
    command += ["--device", device, "--json", str(report)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stderr:
            if line.startswith(("compiled", "traced")):
                break
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    assert not Report.from_json(report.read_text()).finished


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")
@pytest.mark.parametrize(
    ("factory", "expected", "backend"),
    [
        ("as_input", [("capture-input", "state", "note")], "triton"),
        pytest.param("refused", [("refusal", "selective_state_update", "warning")], "torch", marks=pytest.mark.slow),
        pytest.param("twin", [], "triton", marks=pytest.mark.slow),
    ],
)
def test_our_ops_on_an_absent_device(tmp_path, factory, expected, backend):
    """Which backend it would be, what it refuses, and what CUDA graphs would."""
    import torch

    absent = next(kind for kind in ("cuda", "xpu") if not torch.get_device_module(kind).is_available())
    file = tmp_path / "report.json"
    command = [f"compile_tests.planted.decode:{factory}", "--no-try", "--device", absent, "--json", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = Report.from_json(file.read_text())
    assert [(f.cause, f.op, f.severity) for f in report.findings] == expected
    assert all("# planted" in finding.where.source for finding in report.findings)
    assert report.backends["selective_state_update"].startswith(f"{backend} (1)")
    assert f"selective_state_update would run on {backend}" in result.output


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed")
@pytest.mark.parametrize(("name", "cause"), [("Launch", "triton"), ("ToHost", "host-copy")])
def test_planted_for_an_absent_device(tmp_path, name, cause):
    import torch

    absent = next(kind for kind in ("cuda", "xpu") if not torch.get_device_module(kind).is_available())
    from compile_tests.planted import launch

    here = Path(launch.__file__).resolve()
    sys.path.insert(0, str(here.parents[2]))
    target = tmp_path / "made.py"
    target.write_text(
        f"import torch\nfrom compile_tests.planted import launch\n"
        f"def bad(): return launch.{name}(), torch.ones(4, 8)\n"
        f"def twin(): return launch.{name}Twin(), torch.ones(4, 8)\n"
    )
    for factory, expected in (("bad", [cause]), ("twin", [])):
        file = tmp_path / f"{factory}.json"
        result = CliRunner().invoke(app, [f"{target}:{factory}", "--no-try", "--device", absent, "--json", str(file)])
        assert result.exit_code == 0, result.output
        report = Report.from_json(file.read_text())
        assert report.absent
        assert [f.cause for f in report.findings] == expected
        for finding in report.findings:
            assert "# planted" in finding.where.source
