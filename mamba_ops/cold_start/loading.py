"""Compiles Triton kernels before they are launched, several at a time.

The calls of a warm-up are made with a hook that sees which variant each launch needs. A variant on disk is read and
launched. Any other is compiled by a worker process (see worker.py), and its launch is skipped. The launches of new
variants after it in the same call are skipped too: they would read what the skipped one did not write. Such calls are
made again when all variants are on disk.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from mamba_ops.cold_start import elsewhere
from mamba_ops.ops._triton import _triton
from mamba_ops.registry.jit import current_call

_UNSEEN = "a warm-up does not see what is compiled"


@dataclass
class Load:
    """One variant of a kernel that is compiled, or read from disk."""

    kernel: str
    op: str
    seconds: float = 0.0
    from_disk: bool | None = None
    """None: it is neither compiled nor read yet."""
    submitted: bool = False
    """Whether the worker was told to compile it."""


@dataclass
class Request:
    """The variants that a call was the first to need, and whether one of its launches was skipped."""

    loads: list[Load]
    skipped: bool = False


@dataclass
class Loader:
    """Finds the variants that calls need, and lets worker processes compile them.

    Attributes:
        device: the one that is compiled for.
        processes: how many compile at a time.
        hashing: a thread that hashes Triton's own files, as every key of its cache needs.
        loads: the variants, in the order in which they were needed, by kernel and Triton's key.
    """

    device: torch.device
    processes: int
    hashing: threading.Thread | None
    loads: dict[tuple[str, str], Load] = field(default_factory=dict)
    _skips: bool = field(default=False, repr=False)
    _skipped: bool = field(default=False, repr=False)
    _new: list[Load] = field(default_factory=list, repr=False)
    _now: tuple[Load, float] | None = field(default=None, repr=False)
    _jobs: list[Load] = field(default_factory=list, repr=False)
    _worker: "subprocess.Popen[str] | None" = field(default=None, repr=False)
    _lines: SimpleQueue[str | None] = field(default_factory=SimpleQueue, repr=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, record what Triton loads."""
        before = _triton.hook(_triton.BEFORE_LOAD, self._before, _UNSEEN)
        with before, _triton.hook(_triton.LOADED, self._after, _UNSEEN):
            try:
                if not any(_triton.cache_dir().glob("*/*.json")):  # no kernel: all are to be compiled, so start at once
                    self._worker = self._start()
                yield
            finally:
                if self._worker is not None:
                    self._end(self._worker)

    @contextmanager
    def requesting(self) -> Iterator[Request]:
        """Within the block, variants that are not on disk go to the worker, and their launches are skipped."""
        self._skips, self._skipped = True, False
        request = Request([])
        try:
            with self.collecting() as request.loads:
                yield request
        finally:
            self._skips, request.skipped = False, self._skipped

    @contextmanager
    def collecting(self) -> Iterator[list[Load]]:
        """Within the block, collect the variants that were not needed before."""
        new: list[Load] = []
        self._new = new
        yield new

    def wait(self, progress: Callable[[str, int, int], None]) -> None:
        """Wait until the worker is done. A variant that it could not compile is compiled when it is launched."""
        if self._worker is None:
            return
        self._lines.put(None)
        assert self._worker.stdout is not None  # for mypy: it is a pipe
        for done, line in enumerate(self._worker.stdout, 1):
            number, seconds, problem = json.loads(line)
            if problem is None:
                self._jobs[number].seconds, self._jobs[number].from_disk = seconds, False
            progress("compiling", done, len(self._jobs))

    def _before(self, *_: object, key: str, fn: Any, compile: Any, **__: object) -> bool:
        """Triton's hook before it loads a variant; True skips the launch."""
        if self.hashing is not None:
            self.hashing.join()
        name = f"{fn.module}.{fn.name}"
        if (load := self.loads.get((name, key))) is None:
            call = current_call()
            load = self.loads[name, key] = Load(name, call[0].qualname if call else "")
            self._new.append(load)
            if self._skips and not _triton.is_on_disk(fn.jit_function, compile):
                self._submit(load, fn, compile["specialization_data"])
        self._skipped |= load.submitted
        self._now = (load, time.perf_counter())
        return self._skips and self._skipped

    def _after(self, *_: object, cache_hit: bool, **__: object) -> None:
        """Triton's listener: a variant is loaded."""
        if self._now is not None:
            load, begin = self._now
            if load.from_disk is None:
                load.from_disk, load.seconds = cache_hit, time.perf_counter() - begin

    def _submit(self, load: Load, fn: Any, data: str) -> None:
        load.submitted = True
        if self._worker is None:
            self._worker = self._start()
        self._lines.put(json.dumps([len(self._jobs), fn.module, fn.name, data]) + "\n")
        self._jobs.append(load)

    def _start(self) -> "subprocess.Popen[str]":
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        environment = {**os.environ, "TRITON_CACHE_DIR": str(_triton.cache_dir()), "PYTHONPATH": paths}
        worker = subprocess.Popen(
            [sys.executable, "-m", "mamba_ops.cold_start.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # so that it can be ended with its forks
        )
        on_device: AbstractContextManager[object] = nullcontext()
        if self.device.type != "cpu":  # a new thread has the first device as its current one
            module = torch.get_device_module(self.device)
            on_device = module.device(self.device if self.device.index is not None else module.current_device())
        threading.Thread(target=self._tell, args=(worker, on_device), daemon=True).start()
        return worker

    def _end(self, worker: "subprocess.Popen[str]") -> None:
        self._lines.put(None)
        if hasattr(os, "killpg"):
            with suppress(OSError):  # it and its forks may have ended
                os.killpg(worker.pid, signal.SIGKILL)
        else:
            worker.kill()
        worker.wait()
        assert worker.stdout is not None  # for mypy: it is a pipe
        worker.stdout.close()

    def _tell(self, worker: "subprocess.Popen[str]", on_device: AbstractContextManager[object]) -> None:
        """Write the target and the jobs to the worker, in a thread.

        What describes a target may take a C compiler, and a pipe holds few jobs while the worker imports torch.
        """
        assert worker.stdin is not None  # for mypy: it is a pipe
        try:
            with worker.stdin as pipe:
                with on_device:
                    first = {"target": elsewhere.describe_target(), "processes": self.processes}
                line: str | None = json.dumps(first) + "\n"
                while line is not None:
                    pipe.write(line)
                    pipe.flush()
                    line = self._lines.get()
        except BrokenPipeError:  # it could not start, or is not needed any more: this process compiles
            return


def cores() -> int:
    """Return how many processes may run at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds_by_kernel(loads: list[Load]) -> list[tuple[str, int, float]]:
    """Return every kernel, how many variants of it, and the seconds that they took, the slowest first."""
    found: dict[str, list[float]] = {}
    for load in loads:
        found.setdefault(load.kernel, []).append(load.seconds)
    return sorted(((kernel, len(s), sum(s)) for kernel, s in found.items()), key=lambda row: -row[2])
