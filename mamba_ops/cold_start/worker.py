"""A process that compiles Triton kernels in forks of itself; the parent writes jobs to it and reads results.

It uses no GPU: compiled kernels go to Triton's cache on disk, and the parent reads them there. It is no fork of the
parent, whose threads and GPU no fork survives; nor is there a process for each compiler, as each would import torch.

Where Triton writes a launcher in C for each signature (3.6 does, 3.7 has one for all), a C compiler makes it here too:
it takes about as long as the kernel.
"""

import importlib
import json
import multiprocessing
import sys
import time
from functools import reduce
from typing import Any


class Target:
    """Stands for Triton's driver: knows the target, and makes launchers, but has no device.

    Args:
        target: what the parent compiles for.
        launcher, utils: module and name of the types that the parent's driver has under these names; None: it has none.
    """

    def __init__(self, target: dict[str, Any], launcher: tuple[str, str] | None, utils: tuple[str, str] | None) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(**target)
        self.launcher_cls = named(*launcher) if launcher else None
        self.utils = named(*utils)() if utils else None

    def get_current_device(self) -> int:
        """One device is as good as another."""
        return 0

    def get_current_target(self) -> Any:
        """What the parent compiles for."""
        return self.target


def named(module: str, name: str) -> Any:
    """Return what a module has under a dotted name."""
    return reduce(getattr, name.split("."), importlib.import_module(module))


def compile_one(number: int, module: str, name: str, data: str) -> str:
    """Compile one variant; return its number, the seconds it took and what went wrong, as JSON."""
    from triton.runtime import driver

    begin, problem = time.perf_counter(), None
    try:
        kernel = named(module, name).preload(data)
        if (launcher := driver.active.launcher_cls) is not None:
            launcher(kernel.src, kernel.metadata)
    except Exception as error:  # the parent compiles it itself, and the error is its to raise
        problem = repr(error)
    return json.dumps([number, time.perf_counter() - begin, problem])


def main() -> None:
    """Read the target, then jobs until the input ends; print a line for each that is done."""
    from triton.runtime import driver

    from mamba_ops.cold_start.specialization import our_modules

    our_modules()  # once, before the forks
    first = json.loads(sys.stdin.readline())
    driver.set_active(Target(first["target"], first["launcher"], first["utils"]))
    with multiprocessing.get_context("fork").Pool(first["processes"]) as pool:
        results = [
            pool.apply_async(compile_one, json.loads(line), callback=lambda text: print(text, flush=True))  # noqa: T201
            for line in sys.stdin
        ]
        for result in results:
            result.wait()


if __name__ == "__main__":
    main()
