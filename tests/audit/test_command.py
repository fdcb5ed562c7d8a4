"""The command: its options, its exit status, and what it says of bad targets."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
import typer
from typer.testing import CliRunner

from mamba_ops.audit.cli import audit_command
from mamba_ops.audit.report import Report

app = typer.Typer(add_completion=False)
app.command("audit")(audit_command)

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
def wrong(): return 3
"""


@pytest.fixture
def run(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(MODEL)

    def run(target, *options):
        sys.modules.pop("theirs", None)
        arguments = [target.replace("theirs.py", str(file))]
        return CliRunner().invoke(app, [*arguments, *options])

    return run


def test_a_break_is_shown_with_its_line_and_fails_on_request(run, tmp_path):
    result = run("theirs.py:net")
    assert result.exit_code == 0
    assert "theirs.py:7 in forward" in result.output.replace("\n", "")
    assert run("theirs.py:net", "--fail-on", "break").exit_code == 1
    assert run("theirs.py:net", "--fail-on", "copy,jit").exit_code == 0
    assert run("theirs.py:clean", "--fail-on", "break,recompile").exit_code == 0


def test_json_html_and_comparison(run, tmp_path):
    file, html = tmp_path / "report.json", tmp_path / "report.html"
    assert run("theirs.py:net", "--json", str(file), "--html", str(html)).exit_code == 0
    report = Report.from_json(file.read_text())
    assert [f.cause for f in report.findings] == ["branch"]
    assert "y.sum()" in html.read_text()
    result = run("theirs.py:clean", "--compare", str(file))
    assert "gone" in result.output


def test_shapes_make_calls(run):
    result = run("theirs.py:clean", "--shapes", "2x8,3x8,5x8", "--json", "-")
    text = result.stdout[result.stdout.index("{") :]
    assert [row["shapes"] for row in json.loads(text)["calls"]] == ["2x8", "3x8", "5x8"]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("theirs.py:wrong", (), "expected (model, inputs)"),
        ("theirs.py:fails", (), "the model raised RuntimeError without the compiler"),
        ("theirs.py:nobody", (), "has no function nobody"),
        ("nowhere.py:net", (), "there is no file nowhere.py"),
        ("theirs.py:net", ("--shapes", "2by3"), "expected sizes such as"),
        ("theirs.py:net", ("--fail-on", "rain"), "expected some of break"),
        ("theirs.py:net", ("--device", "toaster"), "expected cpu, cuda or xpu"),
        ("theirs.py:net", ("--layers", "3"), "--layers and --full are for transformers:NAME alone"),
    ],
)
def test_bad_targets(run, target, options, said):
    result = run(target, *options)
    assert result.exit_code == 2
    assert said in result.output


def test_the_users_error_comes_with_their_traceback(run, capfd):
    result = run("theirs.py:fails")
    assert result.exit_code == 2
    assert "return x @ torch.ones(3, 3)" in result.output + capfd.readouterr().err


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
    result = CliRunner().invoke(app, ["--run", str(script), "3", "--fail-on", "break"])
    assert result.exit_code == 1, result.output
    assert "loop.py:4 in f" in result.output.replace("\n", "")


def test_gradients_of_an_absent_device_are_refused(run):
    import torch

    absent = next(name for name in ("xpu", "cuda") if not torch.get_device_module(name).is_available())
    result = run("theirs.py:net", "--device", absent, "--train")
    assert result.exit_code == 2
    assert "is not present on this machine" in result.output


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
        result = CliRunner().invoke(app, [f"{target}:{factory}", "--device", absent, "--json", str(file)])
        assert result.exit_code == 0, result.output
        report = Report.from_json(file.read_text())
        assert report.absent
        assert [f.cause for f in report.findings] == expected
        for finding in report.findings:
            assert "# planted" in finding.where.source
