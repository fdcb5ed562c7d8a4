"""A process that compiles Triton kernels in forks of itself; the parent writes jobs to it and reads results.

It uses no GPU: compiled kernels go to Triton's cache on disk, where the parent reads them. It is not a fork of the
parent, because threads and a GPU in use do not survive a fork. Its own forks share one import of torch.

Triton 3.6 writes a launcher in C for each signature (3.7 has one for all). It is compiled here too: that takes about as
long as the kernel.
"""

import json
import multiprocessing
import sys
import time

from mamba_ops.cold_start import elsewhere
from mamba_ops.ops._triton import _triton


def compile_one(number: int, module: str, name: str, data: str) -> str:
    """Compile one variant; return its number, the seconds it took and what went wrong, as JSON."""
    begin, problem = time.perf_counter(), None
    try:
        elsewhere.compile_variant(_triton.named(module, name), data)
    except Exception as error:  # the parent compiles this variant itself, and raises the error
        problem = repr(error)
    return json.dumps([number, time.perf_counter() - begin, problem])


def main() -> None:
    """Read the target, then jobs until the input ends; print a line for each that is done."""
    from mamba_ops.cold_start.specialization import our_modules

    our_modules()  # once, before the forks
    first = json.loads(sys.stdin.readline())
    elsewhere.compile_for(first["target"])
    with multiprocessing.get_context("fork").Pool(first["processes"]) as pool:
        results = [
            pool.apply_async(compile_one, json.loads(line), callback=lambda text: print(text, flush=True))  # noqa: T201
            for line in sys.stdin
        ]
        for result in results:
            result.wait()


if __name__ == "__main__":
    main()
