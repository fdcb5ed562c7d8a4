"""A stand-in for a GPU's driver, for child processes of tests: Triton compiles for an H100, and launches nothing.

CPU tensors take the place of a GPU's, and every launch ends once its kernel is compiled.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported, which decides as it decorates

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mamba_ops.cold_start.targets import TARGETS, StandIn


class Driver(StandIn):
    """As much of an H100's driver as a launch asks before it compiles."""

    def __init__(self) -> None:
        super().__init__(TARGETS["sm_90"])

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)  # tests take from the package what it names this by


class Launcher:
    """Stands for what Triton's driver compiles to launch a kernel: each leaves its kernel's and its process's name."""

    def __init__(self, src: Any, metadata: Any) -> None:
        Path(os.environ["LAUNCHERS"], f"{metadata.hash} {os.getpid()}").touch()


launches: list[str] = []
"""The names of all kernels that were launched, were there a GPU."""


class Nothing:
    """What stands for a compiled kernel where kernels are only asked for."""

    metadata = SimpleNamespace(shared=0)


def install(*, compiles: bool = True) -> None:
    """Put the driver in place, for good; the backend `triton` then takes CPU tensors, by default.

    Args:
        compiles: whether kernels are compiled. Else Triton knows all variants that were asked for, and has none.
    """
    from mamba_ops import backends
    from mamba_ops.ops._triton import _triton

    def note(src: Any, **_: Any) -> Nothing:
        if (listener := triton.knobs.compilation.listener) is not None:
            listener(src=src, metadata={}, metadata_group={}, times=times, cache_hit=False)
        return Nothing()

    times = triton.knobs.CompileTimes(ir_initialization=1, lowering_stages=[], store_results=0)
    if not compiles:
        triton.compiler.compile = note
        _triton.is_on_disk = lambda *_: True  # else another process compiled it

    triton.runtime.driver.set_active(Driver())
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            launches.append(self.__name__)
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_only
    backends.triton.devices = ("cpu", "cuda", "xpu")
