"""Compiles Triton kernels before they are launched, many at a time.

The calls are made with a hook that sees which variant a launch needs. What is on disk is read and launched. What is not
is compiled by another process (see worker.py) in forks of itself, as Triton often holds Python's lock; its launch ends
there, and so do those of new variants after it in that call, which would read what it did not write. Such a call is
made again when all are on disk.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mamba_ops.registry.jit import current_call

LAUNCHERS = ["triton.backends.nvidia.driver"]
"""Drivers whose launchers are made without a GPU; of others that is not known."""


@dataclass
class Load:
    """One variant of a kernel that is compiled, or read from disk."""

    kernel: str
    op: str
    seconds: float = 0.0
    from_disk: bool | None = None
    """None: nobody has it yet."""
    submitted: bool = False
    """Whether the other process was told to compile it."""


@dataclass
class Asked:
    """What a call asked for that nothing before it had, and whether a launch of it was ended."""

    loads: list[Load]
    ended: bool = False


@dataclass
class Loader:
    """Asks for kernels and loads them.

    Attributes:
        processes: how many compile at a time.
        hashing: `hash_triton` in a thread, if it is in one.
        loads: the variants, in the order in which they were asked for, by kernel and Triton's key.
    """

    processes: int
    hashing: threading.Thread | None
    loads: dict[tuple[str, str], Load] = field(default_factory=dict)
    _asks: bool = field(default=False, repr=False)
    _ended: bool = field(default=False, repr=False)
    _new: list[Load] = field(default_factory=list, repr=False)
    _now: tuple[Load, float] | None = field(default=None, repr=False)
    _jobs: list[Load] = field(default_factory=list, repr=False)
    _worker: "subprocess.Popen[str] | None" = field(default=None, repr=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, see what Triton does."""
        from triton import knobs

        with knobs.runtime.scope(), knobs.compilation.scope():
            knobs.runtime.jit_cache_hook = self._before
            knobs.compilation.listener = self._after
            try:
                if not _holds_anything(Path(knobs.cache.dir)):
                    self._worker = self._start()
                yield
            finally:
                if self._worker is not None:
                    self._worker.kill()
                    self._worker.wait()

    @contextmanager
    def asking(self) -> Iterator[Asked]:
        """Within the block, what is not on disk begins to compile, and launches of it end before they begin."""
        self._asks, self._ended = True, False
        asked = Asked([])
        try:
            with self.seeing() as asked.loads:
                yield asked
        finally:
            self._asks, asked.ended = False, self._ended

    @contextmanager
    def seeing(self) -> Iterator[list[Load]]:
        """Within the block, collect the variants that were not asked for before."""
        new: list[Load] = []
        self._new = new
        yield new

    def wait(self, progress: Callable[[str, int, int], None]) -> None:
        """Wait until all that was asked for is on disk; what could not be compiled there is when it is launched."""
        if self._worker is None:
            return
        assert self._worker.stdin is not None  # for mypy: both are pipes
        assert self._worker.stdout is not None
        try:
            self._worker.stdin.close()
        except BrokenPipeError:
            return
        for done, line in enumerate(self._worker.stdout, 1):
            number, seconds, problem = json.loads(line)
            if problem is None:
                self._jobs[number].seconds, self._jobs[number].from_disk = seconds, False
            progress("compiling", done, len(self._jobs))

    def _before(self, *_: object, key: str, fn: Any, compile: Any, **__: object) -> bool:
        """Triton's hook: it has no such variant in this process; True ends the launch."""
        if self.hashing is not None:
            self.hashing.join()
        name = f"{fn.module}.{fn.name}"
        if (load := self.loads.get((name, key))) is None:
            call = current_call()
            load = self.loads[name, key] = Load(name, call[0].qualname if call else "")
            self._new.append(load)
            if self._asks and not _is_on_disk(fn.jit_function, compile):
                self._submit(load, fn, compile["specialization_data"])
        self._ended |= load.submitted
        self._now = (load, time.perf_counter())
        return self._asks and self._ended

    def _after(self, *_: object, cache_hit: bool, **__: object) -> None:
        """Triton's listener: a variant is there."""
        if self._now is not None:
            load, begin = self._now
            if load.from_disk is None:
                load.from_disk, load.seconds = cache_hit, time.perf_counter() - begin

    def _submit(self, load: Load, fn: Any, data: str) -> None:
        load.submitted = True
        if self._worker is None:
            self._worker = self._start()
        assert self._worker.stdin is not None  # for mypy: it is a pipe
        try:
            self._worker.stdin.write(json.dumps([len(self._jobs), fn.module, fn.name, data]) + "\n")
            self._worker.stdin.flush()
        except BrokenPipeError:  # it could not start; then this process compiles
            return
        self._jobs.append(load)

    def _start(self) -> "subprocess.Popen[str]":
        from triton import knobs
        from triton.runtime import driver

        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # noqa: PTH109
        environment = {**os.environ, "TRITON_CACHE_DIR": knobs.cache.dir, "PYTHONPATH": paths}
        worker = subprocess.Popen(
            [sys.executable, "-m", "mamba_ops.cold_start.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert worker.stdin is not None  # for mypy: it is a pipe
        target = driver.active.get_current_target()  # it may take a C compiler; the worker imports torch meanwhile
        launcher, utils = (getattr(driver.active, name, None) for name in ("launcher_cls", "utils"))
        if launcher is None or launcher.__module__ not in LAUNCHERS:
            launcher = utils = None
        first = {
            "target": vars(target),
            "launcher": launcher and _name(launcher),
            "utils": utils and _name(type(utils)),
            "processes": self.processes,
        }
        worker.stdin.write(json.dumps(first) + "\n")
        worker.stdin.flush()
        return worker


def hash_triton() -> None:
    """Import Triton, if it is here, and hash its own files, as every key of its cache needs: others can go on."""
    with suppress(Exception):  # who needs Triton meets its error
        from triton.runtime.cache import triton_key

        triton_key()


def cores() -> int:
    """How many processes may run at a time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _holds_anything(folder: Path) -> bool:
    return folder.exists() and any(folder.iterdir())


def _name(kind: type[Any]) -> tuple[str, str]:
    """Return by what name another process finds a type."""
    return kind.__module__, kind.__qualname__


def _is_on_disk(function: Any, asked: Any) -> bool:
    """Whether Triton's cache has a variant: what its compiler looks at first."""
    from triton.compiler.compiler import ASTSource, get_cache_key, make_backend
    from triton.runtime import driver
    from triton.runtime.cache import get_cache_manager
    from triton.runtime.jit import get_cache_invalidating_env_vars

    backend = make_backend(driver.active.get_current_target())
    options = json.loads(asked["specialization_data"])["options"]
    options = backend.parse_options({n: tuple(v) if isinstance(v, list) else v for n, v in options.items()})
    source = ASTSource(function, asked["signature"], asked["constants"], asked["configs"][0])
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    name = f"{source.name[:150]}.json"
    group = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(name)
    return bool(group) and name in group


def seconds_by_kernel(loads: list[Load]) -> list[tuple[str, int, float]]:
    """Return every kernel, how many variants of it, and the seconds that they took, the slowest first."""
    found: dict[str, list[float]] = {}
    for load in loads:
        found.setdefault(load.kernel, []).append(load.seconds)
    return sorted(((kernel, len(s), sum(s)) for kernel, s in found.items()), key=lambda row: -row[2])
