"""A layer of flash-linear-attention as its package holds it: the audit finds what keeps it from being one graph."""

import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("triton")
pytest.importorskip("typer")
import torch

from mamba_ops.audit.command import Options, run
from mamba_ops.audit.report import Report

WHEELS = ("flash-linear-attention==0.5.2", "fla-core==0.5.2", "einops==0.8.2")
MAKE = """
import sys
sys.path.insert(0, {site!r})
import torch

def make():
    from fla.layers import GatedDeltaNet
    return GatedDeltaNet(hidden_size=64, head_dim=16, num_heads=2, num_v_heads=2), torch.randn(1, 128, 64)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    if subprocess.run([*command, *WHEELS], capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("flash-linear-attention cannot be downloaded here")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which CUDA is absent")
def test_flash_linear_attention_disables_the_compiler(site, tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(MAKE.format(site=str(site)))
    report = run(Options(f"{file}:make", "cuda", limit=120), Report(""), lambda step: None)
    [found] = [finding for finding in report.findings if finding.cause == "disable"]
    assert found.op == "causal_conv1d_fwd"
    assert found.where.file.endswith("fla/modules/conv/triton/ops.py")
    assert "causal_conv1d_fwd(" in found.where.source
    assert "mamba_ops.causal_conv1d" in found.remedy
