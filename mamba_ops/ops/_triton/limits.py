"""What a device has, by which rules choose launches: read from the device, never from a list of names."""

import functools
from typing import NamedTuple

import torch

from mamba_ops.ops._triton import _triton
from mamba_ops.ops._triton.common import INTERPRETED

PLENTY = 200_000
"""Bytes of shared memory from which on a GPU multiplies what lies there, and not in registers: those of data centres,
from Hopper on."""


class Limits(NamedTuple):
    """What a device has.

    Attributes:
        shared_memory: bytes of it that a program may have.
        precisions: how Triton can multiply float32 matrices there, as `tl.dot` names it.
        matrix_units: what is multiplied by units of its own: "" (nothing), "parts" (numbers of 2 bytes, and float32 in
            parts) or "float32" (that whole, too).
        caps_registers: whether a launch may say how many a thread gets.
    """

    shared_memory: int
    precisions: tuple[str, ...]
    matrix_units: str
    caps_registers: bool = False

    @property
    def is_large(self) -> bool:
        """Whether large blocks fit, and leave no numbers for which there are no registers."""
        return self.shared_memory >= PLENTY

    @property
    def is_small(self) -> bool:
        """Whether four warps have no registers for blocks of 64 by 64 and for reading ahead, as on RDNA and Turing."""
        return self.shared_memory <= 1 << 16 and self.matrix_units != "float32"

    def precision(self, bits: int) -> str:
        """Return the fastest precision of `tl.dot` that keeps so many bits of float32 numbers.

        "ieee" keeps all 24, and is fast where matrix units take float32. Others multiply parts on matrix units.
        """
        if self.matrix_units == "parts":
            for name, kept in _KEPT.items():
                if kept >= bits and name in self.precisions:
                    return name
        return "ieee"

    def registers(self, most: int) -> dict[str, int]:
        """Return the option of a launch whose threads get so many registers at most, or none where there is none.

        With fewer for each, more programs run side by side, and hide what each waits for.
        """
        return {"maxnreg": most} if self.caps_registers else {}


_KEPT = {"tf32": 11, "tf32x3": 21, "bf16x3": 16, "bf16x6": 24}
"""Precision to the bits that it keeps, the fastest first."""


@functools.cache
def limits_of(device: int) -> Limits:
    """Return what a device has, by its index (-1: the current one). Where Triton cannot say it, launches are small."""
    if INTERPRETED:
        return Limits(1 << 30, ("ieee",), "")
    with torch.accelerator.device_index(device if device >= 0 else None):
        shared = _triton.limit_of_shared_memory()
        shared = 1 << 16 if shared is None else shared
        is_nvidia = _triton.device_family().startswith("cuda-")
        return Limits(shared, _triton.dot_precisions(), _triton.matrix_units(), caps_registers=is_nvidia)


@functools.cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors an accelerator has, 0 for one that is not here (-1) or does not say it."""
    if device < 0 or (accelerator := torch.accelerator.current_accelerator()) is None:
        return 0
    properties = torch.get_device_module(accelerator).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0))
