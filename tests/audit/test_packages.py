"""Layers of flash-linear-attention and mamba-ssm as their packages hold them: the audit finds what breaks them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("typer")
import torch

from mamba_ops.audit.report import Report
from mamba_ops.commands.audit.child import run_in_child
from mamba_ops.commands.audit.target import Options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which CUDA is absent"),
]

FLA = ("flash-linear-attention==0.5.2", "fla-core==0.5.2", "einops==0.8.2")
MAMBA = ("mamba-ssm==2.3.2.post1", "einops==0.8.2")
MAKE = """
import sys
sys.path.insert(0, {site!r})
import torch

def make():
    from {module} import {layer}
    return {layer}({sizes}), torch.randn(1, 128, 64)
"""
STUB = """
#include <pybind11/pybind11.h>
namespace py = pybind11;
py::object fwd(py::args args) { return py::module_::import("selective_scan_values").attr("fwd")(*args); }
PYBIND11_MODULE(selective_scan_cuda, m) { m.def("fwd", &fwd); }
"""
VALUES = """
import torch
def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    out = torch.zeros_like(delta)
    return [out, u.new_zeros(*u.shape[:2], 1, 2 * A.shape[1])] + ([out] if z is not None else [])
"""


def unpacked(folder: Path, *requirements: str) -> Path:
    """Download packages without what they need, and unpack them."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "-d", str(folder)]
    environment = os.environ | {"MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    done = subprocess.run([*command, *requirements], env=environment, capture_output=True, timeout=180, check=False)
    if done.returncode:
        pytest.skip(f"{requirements[0]} cannot be downloaded here")
    site = folder / "site"
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    for source in folder.glob("*.tar.gz"):
        with tarfile.open(source) as archive:
            archive.extractall(folder, filter="data")
        (package,) = folder.glob("mamba_ssm-*/mamba_ssm")
        shutil.copytree(package, site / "mamba_ssm")
    return site


@pytest.fixture(scope="module")
def fla(tmp_path_factory):
    return unpacked(tmp_path_factory.mktemp("fla"), *FLA)


@pytest.fixture(scope="module")
def mamba_ssm(tmp_path_factory):
    """Mamba-ssm's Python files, beside a stand-in of its extension that pybind11 made: Dynamo asks what it is."""
    site = unpacked(tmp_path_factory.mktemp("mamba"), *MAMBA)
    (site / "selective_scan_values.py").write_text(VALUES)
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the stand-in of mamba-ssm's extension")
    folders = (Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"])
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-o", str(site / "selective_scan_cuda.so")]
    command += [*(f"-I{folder}" for folder in folders), "-x", "c++", "-"]
    done = subprocess.run(command, input=STUB.encode(), capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"the stand-in of mamba-ssm's extension cannot be built: {done.stderr.decode()[:200]}")
    return site


def audited(folder: Path, **names: str) -> Report:
    file = folder / "theirs.py"
    file.write_text(MAKE.format(**names))
    report = Report("")
    run_in_child(Options(f"{file}:make", "cuda", limit=120), report)
    return report


def test_flash_linear_attention_disables_the_compiler(fla, tmp_path):
    sizes = "hidden_size=64, head_dim=16, num_heads=2, num_v_heads=2"
    report = audited(tmp_path, site=str(fla), module="fla.layers", layer="GatedDeltaNet", sizes=sizes)
    [found] = [finding for finding in report.findings if finding.cause == "disable"]
    assert found.op == "causal_conv1d_fwd"
    assert found.where.file.endswith("fla/modules/conv/triton/ops.py")
    assert "causal_conv1d_fwd(" in found.where.source
    assert "mamba_ops.causal_conv1d" in found.remedy


def test_mamba_ssm_calls_its_extension(mamba_ssm, tmp_path):
    module = "mamba_ssm.modules.mamba_simple"
    report = audited(tmp_path, site=str(mamba_ssm), module=module, layer="Mamba", sizes="64, d_state=8")
    [found] = [finding for finding in report.findings if finding.cause == "pybind"]
    assert found.op == "selective_scan_cuda.fwd"
    assert found.where.file.endswith("mamba_ssm/ops/selective_scan_interface.py")
    assert "selective_scan_cuda.fwd(" in found.where.source
    assert "mamba_ops.selective_scan" in found.remedy


def test_mamba_ssm_launches_triton_kernels(mamba_ssm, tmp_path):
    sizes = "64, d_state=16, headdim=16, use_mem_eff_path=False"
    module = "mamba_ssm.modules.mamba2"
    report = audited(tmp_path, site=str(mamba_ssm), module=module, layer="Mamba2", sizes=sizes)
    found = {finding.op: finding for finding in report.findings if finding.cause == "triton"}
    scan = found["_chunk_scan_fwd_kernel"]
    assert scan.where.file.endswith("mamba_ssm/ops/triton/ssd_chunk_scan.py")
    assert "_chunk_scan_fwd_kernel[grid](" in scan.where.source
    assert "mamba_ops.mamba_chunk_scan" in scan.remedy
    assert "mamba_ops" not in found["_layer_norm_fwd_1pass_kernel"].remedy
    assert not any(finding.breaks for finding in report.findings)
