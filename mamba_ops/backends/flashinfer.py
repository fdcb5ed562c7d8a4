"""The backend `flashinfer`: what must be installed, which GPUs it runs on, and what its adapters share."""

import functools
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from mamba_ops.registry import Backend

_OLDEST = "0.7.2"  # the adapters have its signatures and limits
INSTALL = "mamba-ops[flashinfer]"


def usable() -> str | None:
    import flashinfer
    from packaging.version import Version  # which flashinfer requires

    version = Version(str(flashinfer.__version__))
    if version.release != (0, 0, 0) and version < Version(_OLDEST):  # a build from source has no number
        return (
            f"flashinfer {version} is installed, and {_OLDEST} is the oldest that will do; pip install -U '{INSTALL}'"
        )
    if torch.version.hip is not None:
        return f"flashinfer runs on CUDA, and this torch is built for ROCm; with one for CUDA, pip install '{INSTALL}'"
    compiler = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or shutil.which("nvcc")
    prebuilt = importlib.util.find_spec("flashinfer_jit_cache") is not None
    if not (compiler or prebuilt or Path("/usr/local/cuda").exists()):
        return (
            "flashinfer compiles its kernels, and there is no CUDA compiler (nvcc) here; install CUDA's toolkit, "
            f"or pip install '{INSTALL}' flashinfer-jit-cache"
        )
    return None


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    major, minor = torch.get_device_module(device).get_device_capability(device)
    return major, minor


def older_than(major: int, device: torch.device, what: str = "") -> str | None:
    """Return a refusal for a GPU that is older than a compute capability."""
    mine = capability(device)
    if mine[0] >= major:
        return None
    return f"takes {what}GPUs from compute capability {major}.0 on, and this one has {mine[0]}.{mine[1]}"


def other_than(major: int, device: torch.device) -> str | None:
    """Return a refusal for a GPU of another major compute capability."""
    mine = capability(device)
    if mine[0] == major:
        return None
    return f"takes GPUs of compute capability {major}, and this one has {mine[0]}.{mine[1]}"


def not_installed(module: str, package: str, what: str) -> str | None:
    """Return a refusal where a module that FlashInfer needs for `what` is not there."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"needs {package} for {what}, which is not installed; pip install '{INSTALL}'"


def why_not_setting(name: str, value: str, device: torch.device) -> str | None:
    tensor_memory = name == "algorithm" and value in ("vertical", "horizontal")
    return older_than(9, device, f"the algorithm {value} on ") if tensor_memory else None


flashinfer = Backend(
    "flashinfer",
    devices=("cuda",),
    requires="flashinfer",
    install=INSTALL,
    usable=usable,
    priority=10,
    settings={"algorithm": ("auto", "simple", "vertical", "horizontal")},
    why_not_setting=why_not_setting,
)


def cleaned(table: Tensor, null_slot: int) -> Tensor:
    """Return a slot table as int32, with -1 for all padding: FlashInfer has one number for that."""
    table = table if table.dtype == torch.int32 else table.to(torch.int32)
    if null_slot <= 0:
        return torch.threshold(table, max(null_slot, -1), -1)  # in one launch
    return torch.where((table < 0) | (table == null_slot), -1, table)


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor that is contiguous and starts at a multiple of 16 bytes: itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() & 15 else tensor


def first_column(table: Tensor, rows: int) -> Tensor:
    """Return column 0 of the first rows of a slot table, in few views: each costs the host microseconds."""
    if table.dim() == 2:
        return table[:rows, 0]
    return table if table.shape[0] == rows else table[:rows]


def is_padding(slots: Tensor, rank: int = 1) -> Tensor:
    """Return which of cleaned slots are -1, as booleans of `rank` dimensions, the last ones of size 1.

    It is a view of the upper bytes, without a launch: slots are fewer than 2^24, so those of others are zero.
    """
    rows, ones = slots.shape[0], (1,) * (rank - 1)
    return slots.view(torch.bool).as_strided((rows, *ones), (4, *ones), 3)
