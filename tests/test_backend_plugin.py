"""A package of somebody else's adds a backend: examples/backend_plugin, installed and found through its entry point."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fresh

pytest.importorskip("setuptools", reason="installing the plug-in needs setuptools and pip")
pytest.importorskip("pip")

ROOT = Path(__file__).parents[1]


def install(example: str, folder: Path) -> Path:
    """Install a plug-in of examples/ below a folder; return where to."""
    shutil.copytree(ROOT / "examples" / example, folder / "source")  # the build leaves files beside it
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--target", folder / "site", folder / "source")
    done = subprocess.run((sys.executable, "-m", "pip", "install", "-q", *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed plug-in."""
    return install("backend_plugin", tmp_path_factory.mktemp("plugin"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder that holds a plug-in whose import fails."""
    info = tmp_path / "broken_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mamba_ops.backends]\nbroken = broken_backend\n")
    (tmp_path / "broken_backend.py").write_text("raise OSError('libvendor.so: cannot open shared object file')\n")
    return tmp_path


def run(code: str, *folders: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run code in a fresh process that sees the packages in `folders`; warnings of ours are errors there."""
    path = os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | environment
    return fresh.run([*fresh.STRICT, "-c", code], env=env, cwd=folders[0])


def succeed(code: str, *folders: Path, **environment: str) -> str:
    done = run(code, *folders, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CALL = """
from mamba_ops import causal_conv1d_update, explain
sample = causal_conv1d_update.make_samples("cpu")[0]
causal_conv1d_update(*sample.args, **sample.kwargs)
print(explain(causal_conv1d_update, *sample.args, **sample.kwargs))
"""

COMPARE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from mamba_ops import causal_conv1d_update, explain, use_backend
from tests.harness import judge

with use_backend("example"):
    for sample in causal_conv1d_update.make_samples("cpu"):
        explanation = explain(causal_conv1d_update, *sample.args, **sample.kwargs)
        if explanation.backend is None:
            print(sample, explanation.reasons["example"], sep=": ")
        else:
            judge(causal_conv1d_update, sample, causal_conv1d_update)
            print(sample, "right", sep=": ")
"""

SWAP = """
import torch
from mamba_ops import causal_conv1d_update, record_selections, use_backend
sample = causal_conv1d_update.make_samples("cpu")[0]
step = torch.compile(lambda: causal_conv1d_update(*sample.args, **sample.kwargs), backend="aot_eager", fullgraph=True)
with record_selections() as runs:
    step()
    with use_backend("example"):
        step()
    step()
print(*(run.backend for run in runs))
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


def test_its_kernel_is_right_where_it_does_not_refuse(installed: Path):
    said = dict(line.split(": ", 1) for line in succeed(COMPARE, installed).splitlines())
    assert said["base"] == said["no optional"] == said["null rows"] == "right"
    assert {sentence for sentence in said.values() if sentence != "right"} == {
        "takes one token a row, x as (n, dim) without cu_seqlens",
        "does not do speculative decoding (num_accepted_tokens)",
        "does not know newest_last",  # which the op gained
    }


def test_it_is_swapped_in_under_a_compiled_graph(installed: Path):
    assert succeed(SWAP, installed).splitlines() == ["torch example torch", "1"]


def test_in_the_default_order_it_comes_after_torch(installed: Path):
    rows = dict(line.split(maxsplit=1) for line in succeed(CALL, installed).splitlines()[1:])
    assert rows["torch"] == "runs (default order)"
    assert rows["example"] == "comes after torch in the default order"


@pytest.mark.parametrize("value", ["Example", "causal_conv1d_update=example, torch"])
def test_the_environment_selects_it(installed: Path, value: str):
    rows = dict(line.split(maxsplit=1) for line in succeed(CALL, installed, MAMBA_OPS_BACKEND=value).splitlines()[1:])
    assert rows["example"] == "runs (MAMBA_OPS_BACKEND)"


def test_asked_for_by_name_it_refuses_and_does_not_fall_back(installed: Path):
    done = run(CALL.replace("[0]", "[-1]"), installed, MAMBA_OPS_BACKEND="example")
    assert done.returncode == 1
    assert "NoBackendError: mamba_ops::causal_conv1d_update: the backend asked for refuses this call" in done.stderr
    assert "  example  " in done.stderr


def test_importing_mamba_ops_imports_no_plug_in(installed: Path):
    code = "import sys, mamba_ops; print('mamba_ops_example_backend' in sys.modules)"
    assert succeed(code, installed, MAMBA_OPS_BACKEND="example") == "False\n"


def test_a_broken_plug_in_warns_and_does_not_stop_the_rest(installed: Path, broken: Path):
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
{"".join(f"    {line}{chr(10)}" for line in CALL.strip().splitlines())}
print(*(f"{{w.category.__name__}}: {{w.message}}" for w in caught), sep="\\n")
"""
    printed = succeed(code, broken, installed, MAMBA_OPS_BACKEND="example")
    assert "example  runs (MAMBA_OPS_BACKEND)" in printed
    [warning] = [line for line in printed.splitlines() if line.startswith("RuntimeWarning")]
    assert "backend plug-in broken (broken_backend) could not be loaded: OSError('libvendor.so" in warning
