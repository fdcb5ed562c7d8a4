"""Every Triton kernel compiled to SPIR-V for GPUs of Intel's that are not here. Nothing is launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_ops.cold_start import fitting
from mamba_ops.registry import ops

ROOT = Path(__file__).parents[2]
RELEASE = "triton-xpu==3.3.0b1"
"""The newest on PyPI; later ones come with PyTorch for XPU alone."""
REFUSED = {
    ("chunk_gated_delta_rule_backward", "float32"),  # this release gives a product of `_adjoints` two layouts
    ("chunk_kda_backward", "float32"),  # `_adjoints` takes more shared memory than there is
}
"""Op and dtype that go on to the backend `torch`."""


def install(folder: Path) -> None:
    """Install triton-xpu into a folder, beside Triton, which has the same module name."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", folder, "--no-deps", "--pre", RELEASE]
    subprocess.run(command, check=True)


def compiled(folder: Path, gpu: str, dtype: str) -> list[dict]:
    """Return what came of each kernel: see `tests.xpu.spirv`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "tests.xpu.spirv", gpu, dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def triton_xpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux":
        pytest.skip(f"{RELEASE} has been built for Python 3.11 on Linux alone")
    folder = tmp_path_factory.mktemp("triton-xpu")
    install(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("gpu", "dtype"), [("b580", "bfloat16"), ("b580", "float32"), ("pvc", "float16")])
def test_every_kernel_compiles_or_is_refused_by_name(triton_xpu: Path, gpu: str, dtype: str):
    rows = compiled(triton_xpu, gpu, dtype)
    assert {row["op"] for row in rows} == {name for name, op in ops().items() if fitting.launches(op)}
    assert {row["states"] for row in rows if row["op"] == "kda_update"} == {"float32", "int16", "float8_e4m3fn"}
    assert {(row["op"], dtype) for row in rows if row["refused"]} == {entry for entry in REFUSED if entry[1] == dtype}
    kernels = [row for row in rows if row["kernel"]]
    assert all(row["bytes"] > 0 for row in kernels)
    assert all(row["shared"] <= 131_072 for row in kernels if (row["op"], dtype) not in REFUSED)
    assert {row["family"] for row in rows} <= {
        "xpu-Intel-R-Arc-TM-B580-Graphics",
        "xpu-Intel-R-Data-Center-GPU-Max-1550",
    }
