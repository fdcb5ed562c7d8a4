"""What the doctor finds: versions, devices, backends, caches, launch tables and known faults, as plain sentences."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mamba_ops
from mamba_ops.commands.options import devices
from mamba_ops.registry import backends

if TYPE_CHECKING:
    from mamba_ops.cold_start.targets import Target

PACKAGES = (
    "triton",
    "triton-xpu",
    "pytorch-triton-xpu",
    "numpy",
    "transformers",
    "flashinfer-python",
    "vllm_xpu_kernels",
)
OLDEST_TORCH = (2, 11)
TESTED = "torch 2.11 to 2.15, Triton 3.6 to 3.9, Transformers 5.17 to 5.24"


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    parts = version.split("+")[0].split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def versions() -> dict[str, str]:
    """Return what is installed, by name."""
    torch_for = next((f"{n} {v}" for n in ("cuda", "hip", "xpu") if (v := getattr(torch.version, n, None))), "cpu")
    found = {
        "mamba-ops": mamba_ops.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built for {torch_for}",
    }
    return found | {name: version for name in PACKAGES if (version := version_of(name)) is not None}


def described(device: torch.device) -> str:
    """Return a device's name, memory and family."""
    if device.type == "cpu":
        return f"{os.cpu_count()} cores"
    properties = torch.get_device_module(device).get_device_properties(device)
    text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if (target := target_here(device)) is not None:
        text += f", {target.name}, {target.shared_memory:,} bytes of shared memory"
    return text


def target_here(device: torch.device) -> "Target | None":
    """Return what Triton compiles for on a device, or None where it does not run, or is interpreted."""
    if device.type == "cpu" or _why_not("triton", device) is not None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    from mamba_ops.cold_start import targets  # imports Triton

    return targets.target_here(device)


def _why_not(name: str, device: torch.device) -> str | None:
    backend = next((known for known in backends() if known.name == name), None)
    return "it is not registered" if backend is None else backend.why_unusable(device.type)


def backends_on(device: torch.device) -> dict[str, str]:
    """Return each backend, with "works" or the sentence why it does not run on a device by default."""
    return {backend.name: backend.why_unusable(device.type) or "works" for backend in backends()}


def caches() -> dict[str, str]:
    """Return where compiled code is kept, and how much of it there is."""
    from mamba_ops.cold_start.transfer import caches as folders

    return {name: f"{folder} ({_size(folder)})" for name, folder in folders().items()}


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "not there yet"
    entries = sum(1 for _ in folder.iterdir())
    return f"{entries} entries" if os.access(folder, os.W_OK) else f"{entries} entries, and it cannot be written"


def launches(device: torch.device) -> str:
    """Return where the launches of Triton's kernels come from on a device."""
    if (reason := _why_not("triton", device)) is not None:
        return f"none on {device.type}: the backend triton {reason}"
    from mamba_ops.cold_start import targets

    return targets.sources_of_launches(device)


def faults(installed: Mapping[str, str]) -> Iterator[str]:
    """Yield what is known to be wrong with this set of versions, and what to do."""
    torch_version, triton = numbers(torch.__version__), installed.get("triton")
    if torch_version < OLDEST_TORCH:
        yield f"torch {torch.__version__} is older than 2.11, the oldest that will do: install a newer one"
    if triton is not None and any(name.endswith("triton-xpu") for name in installed):
        yield (
            "triton and triton-xpu are both installed, and have one module name: uninstall both, then install "
            "triton-xpu alone"
        )
    if triton is not None and numbers(triton) >= (3, 10):
        yield f"Triton {triton} has not been tried ({TESTED} were); kernels that do not compile are refused by name"
    if triton is not None and (numbers(triton) >= (3, 9)) and os.environ.get("TRITON_INTERPRET") == "1":
        yield f"the interpreter of Triton {triton} refuses masks of a block and a flag; mamba-ops mends it for itself"
    if triton is not None and numbers(triton) < (3, 7) and numbers(installed.get("numpy", "0.0")) >= (2, 4):
        yield f"the interpreter of Triton {triton} does not run with NumPy 2.4: for tests, pip install 'numpy<2.4'"
    if torch_version > (2, 15):
        yield f"torch {torch.__version__} has not been tried; {TESTED} were"
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1: Triton's kernels run in Python, on CPU tensors, and by name alone: for tests"
    if sys.platform == "win32" and triton is None:
        yield "there is no Triton for Windows on PyPI: ops run on torch; WSL has it"
    if sys.platform == "darwin":
        yield "on a Mac ops run on torch, on the CPU and on mps; Triton has no backend for mps"


def advice(device: torch.device, installed: Mapping[str, str], refused: Mapping[str, str]) -> Iterator[str]:
    """Yield what to install or to run next."""
    for name, reason in refused.items():
        if "is not installed" in reason and _runs_on(name, device):
            yield f"{name}: {reason.partition('; ')[2]}"
    if "transformers" not in installed:
        yield "for models of Transformers: pip install 'mamba-ops[transformers]'"
    if device.type != "cpu" and refused.get("triton") is None:
        yield "before serving: mamba-ops warm-up TARGET, so that no request waits for a kernel to compile"


def _runs_on(name: str, device: torch.device) -> bool:
    return any(known.name == name and known.is_for(device.type) for known in backends())


def all_devices() -> list[torch.device]:
    """Return the accelerator of this machine, if any, and its CPU."""
    return devices()


def fits(target: Any, sizes: Mapping[str, int]) -> Iterator[Any]:
    """Compile all kernels for a GPU, as far as its shared memory goes; yield each result."""
    from mamba_ops.cold_start.fitting import fits as compiled

    return compiled([target], sizes=sizes)
