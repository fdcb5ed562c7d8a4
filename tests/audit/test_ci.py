"""The command in CI and around scripts: what is new, modules, ranks, and a device that is not present."""

import sys

import pytest

pytest.importorskip("typer")
import typer
from typer.testing import CliRunner

from mamba_ops.audit.report import Report
from mamba_ops.commands.audit.command import audit

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

def net(): return Net(), torch.ones(4, 8)
"""


@pytest.fixture
def run(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(MODEL)

    def run(*options):
        sys.modules.pop("theirs", None)
        return CliRunner().invoke(app, [f"{file}:net", "--no-try", *options])

    return run


def test_a_module_is_watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "train.py").write_text(
        "import sys, torch\n"
        "from . import __name__ as package\n"
        "def f(x):\n"
        "    return x * x.sum().item()\n"
        "if __name__ == '__main__':\n"
        "    assert sys.argv[1:] == ['--lr', '3'] and package == 'their_package'\n"
        "    torch.compile(f, backend='aot_eager')(torch.ones(3))\n"
    )
    result = CliRunner().invoke(app, ["-m", "their_package.train", "--lr", "3", "--fail-on", "break"])
    assert result.exit_code == 1, result.output
    assert "train.py:4 in f" in result.output.replace("\n", "")
    for missing in ("their_package", "their_package.nothing", "nothing_of_that_name.train"):
        result = CliRunner().invoke(app, ["-m", missing])
        assert result.exit_code == 2
        assert f"there is no module {missing} that can be run" in result.output


def test_new_findings_fail_and_old_ones_do_not(run, tmp_path):
    file = tmp_path / "report.json"
    assert run("--json", str(file), "--fail-on", "break").exit_code == 1
    (tmp_path / "theirs.py").write_text(MODEL.replace("class Net", "# moved\n\nclass Net"))
    assert run("--compare", str(file), "--fail-on", "new").exit_code == 0
    assert run("--compare", str(file), "--fail-on", "break").exit_code == 1
    (tmp_path / "theirs.py").write_text(MODEL.replace("y = x * 2", "y = x * x.sum().item()"))
    assert run("--compare", str(file), "--fail-on", "new").exit_code == 1
    assert run("--compare", str(file), "--fail-on", "new,jit").exit_code == 0


def test_ranks_write_files_of_their_own_and_are_read_as_one(run, tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run("--json", str(file)).exit_code == 0
    monkeypatch.delenv("RANK")
    assert not file.exists()
    files = [str(tmp_path / f"report.rank{rank}.json") for rank in (1, 0)]
    result = CliRunner().invoke(app, [*files, "--json", str(file), "--fail-on", "break"])
    assert result.exit_code == 1, result.output
    assert "In rank 0, rank 1" in result.output
    [finding] = Report.from_json(file.read_text()).findings
    assert finding.processes == ("rank 0", "rank 1")
    assert CliRunner().invoke(app, [files[0], files[0]]).exit_code == 2


@pytest.mark.slow
def test_a_script_on_an_absent_device(tmp_path, capfd):
    import torch

    absent = next(name for name in ("cuda", "xpu") if not torch.get_device_module(name).is_available())
    script = tmp_path / "serve.py"
    script.write_text(
        "import torch\n"
        f"device = '{absent}' if torch.{absent}.is_available() else 'cpu'\n"
        "layer = torch.nn.Linear(8, 8).to(device)\n"
        "@torch.compile(mode='max-autotune')\n"
        "def f(x):\n"
        f"    assert x.device.type == '{absent}'\n"
        "    print('here')\n"
        "    return layer(x).cpu()\n"
        "y = f(torch.ones(3, 8, device=device))\n"
        "print('sum', y.sum().item())\n"
        "@torch.compile\n"
        "def after(x):\n"
        "    torch._dynamo.graph_break()\n"
        "    return x + 1\n"
        "after(layer(torch.ones(3, 8, device=device)))\n"
        "torch.ones(4000, 4000, device=device).nonzero()\n"
        "print('not reached')\n"
    )
    result = CliRunner().invoke(app, ["--run", str(script), "--device", absent])
    assert result.exit_code == 0, result.output
    assert "break/print: print" in result.output
    assert "sync/host-copy" in result.output
    assert "stopped/assumed-values: _local_scalar_dense" in result.output
    assert "break/explicit" in result.output  # after the value
    assert "stopped/needs-values" in result.output  # too many values to assume
    printed = capfd.readouterr().out
    assert "sum 1.0" in printed
    assert "not reached" not in printed
