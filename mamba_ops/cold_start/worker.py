"""A process that compiles Triton kernels in forks of itself; the parent writes jobs to it and reads results.

It uses no GPU: compiled kernels go to Triton's cache on disk, where the parent reads them. It is not a fork of the
parent, because threads and a GPU in use do not survive a fork. Its own forks share one import of torch.

Triton 3.6 writes a launcher in C for each signature (3.7 has one for all). It is compiled here too: that takes about as
long as the kernel.
"""

import gc
import json
import multiprocessing
import sys
import threading
import time
from queue import PriorityQueue
from typing import Any

from mamba_ops.cold_start import elsewhere
from mamba_ops.ops._triton import _triton

READING = 0.2  # seconds, to read what was written while this process imported torch
_Job = tuple[int, str, str, str]
"""Its number, the kernel's module and name, and what Triton compiles it for."""


def compile_one(number: int, module: str, name: str, data: str) -> str:
    """Compile one variant; return its number, the seconds it took and what went wrong, as a line of JSON."""
    begin, problem = time.perf_counter(), None
    try:
        elsewhere.compile_variant(_triton.named(module, name), data)
    except Exception as error:  # the parent compiles this variant itself, and raises the error
        problem = repr(error)
    return json.dumps([number, time.perf_counter() - begin, problem]) + "\n"


def code_length(function: Any) -> int:
    """Return how long a kernel's code is in Python, with that of all functions that it calls.

    How long it takes to compile is not known before. The longest first is good enough: what is begun last is what all
    other processes wait for.
    """
    seen: dict[int, int] = {}

    def visit(function: Any) -> None:
        if hasattr(function, "fn") and id(function) not in seen:
            seen[id(function)] = len(function.fn.__code__.co_code)
            for name in function.fn.__code__.co_names:
                visit(function.fn.__globals__.get(name))

    visit(function)
    return sum(seen.values())


def main() -> None:
    """Read the target, then jobs until the input ends; print a line for each that is done."""
    from mamba_ops.cold_start.specialization import our_modules

    our_modules()  # once, before the forks
    first = json.loads(sys.stdin.readline())
    elsewhere.compile_for(first["target"])
    gc.collect()
    gc.freeze()  # the forks leave these pages as they are,
    gc.disable()  # and compile a sixth faster: Triton makes many small objects, and few reference cycles
    waiting: PriorityQueue[tuple[int, int, _Job | None]] = PriorityQueue()
    all_read = threading.Event()

    def serve() -> None:
        all_read.wait(READING)
        while (job := waiting.get()[2]) is not None:
            sys.stdout.write(pool.apply(compile_one, job))
            sys.stdout.flush()

    with multiprocessing.get_context("fork").Pool(first["processes"]) as pool:
        threads = [threading.Thread(target=serve) for _ in range(first["processes"])]
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            job: _Job = json.loads(line)
            waiting.put((-code_length(_triton.named(*job[1:3])), job[0], job))
        all_read.set()
        for number in range(len(threads)):
            waiting.put((1, number, None))  # after all jobs
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
