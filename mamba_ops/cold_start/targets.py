"""GPUs that need not be here: what each has, and a driver that stands for one, so that Triton compiles for it."""

import re
from typing import Any, NamedTuple

import torch

from mamba_ops.ops._triton import _triton, launch_config
from mamba_ops.ops._triton.limits import limits_of
from mamba_ops.registry.errors import unknown


class Target(NamedTuple):
    """A GPU that Triton compiles for.

    Attributes:
        name: as vendors write it: `sm_86`, `gfx942`.
        backend, arch, warp_size: as Triton has them.
        shared_memory: bytes of it that one program may have.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int


_CUDA = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
_HIP = {
    "gfx90a": (64, 65_536),
    "gfx942": (64, 65_536),
    "gfx950": (64, 163_840),
    "gfx1100": (32, 65_536),
    "gfx1200": (32, 65_536),
}
TARGETS = {
    target.name: target
    for target in (
        *(Target(f"sm_{arch}", "cuda", arch, 32, shared) for arch, shared in _CUDA.items()),
        *(Target(name, "hip", name, warp, shared) for name, (warp, shared) in _HIP.items()),
    )
}
"""By name. Of a GPU that is present, Triton's driver says all of this."""


def target_of(name: str) -> Target:
    """Return a target by its name, `sm_86` or `86` or `8.6`, `gfx942`.

    Raises:
        UnknownNameError: there is none; the message lists them.
    """
    plain = name.lower().strip()
    if re.fullmatch(r"(sm_?|cuda-?)?\d+\.?\d+", plain):
        plain = "sm_" + re.sub(r"[^\d]", "", plain)
    if plain not in TARGETS:
        raise unknown("GPU", name, TARGETS)
    return TARGETS[plain]


def target_here(device: torch.device) -> Target:
    """Return what Triton compiles for on a device that is present."""
    index = -1 if device.index is None else device.index
    target = _triton.named(*_triton.DRIVER.split(":")).get_current_target()
    name = f"sm_{target.arch}" if target.backend == "cuda" else launch_config.family(index).partition("-")[2]
    return Target(name, target.backend, target.arch, target.warp_size, limits_of(index).shared_memory)


def sources_of_launches(device: torch.device) -> str:
    """Return the family of a device that is present, and where the launches of Triton's kernels come from on it."""
    family = launch_config.family(-1 if device.index is None else device.index)
    tables = [path for folder in launch_config.folders() if (path := folder / f"{family}.json").is_file()]
    if not tables:
        return f"{family}: by rule, from the device's limits; `mamba-ops tune` measures better ones"
    return f"{family}: {', '.join(map(str, tables))}; by rule for other sizes"


class StandIn:
    """Stands for Triton's driver: as much of it as a launch asks before it compiles. CPU tensors are on its GPU."""

    def __init__(self, target: Target) -> None:
        self.target, self.utils = target, self

    def get_current_device(self) -> int:
        """Return the number of its only device."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the number of its only stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return what Triton compiles for."""
        return _triton.named(*_triton.TARGET.split(":"))(self.target.backend, self.target.arch, self.target.warp_size)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the limits of the GPU, by the names of Triton's own drivers."""
        return {"max_shared_mem": self.target.shared_memory}

    def get_active_torch_device(self) -> torch.device:
        """Return where tensors are."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """Return torch's module for the device."""
        return torch.cuda

    def set_current_device(self, device: int) -> None:
        """Select the only device."""
