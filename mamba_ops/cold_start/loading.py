"""Compiles Triton kernels before they are launched, several at a time.

First the calls are made with a hook that ends every launch where Triton knows the variant that it needs. What was asked
for is then compiled, or read from disk, in threads: most of a compilation is native code and a process of its own. Last
the calls are made again, for real.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mamba_ops.registry.compiling import current_call


@dataclass
class Load:
    """One variant of a kernel that is compiled, or read from disk."""

    kernel: str
    op: str
    seconds: float = 0.0
    from_disk: bool | None = None
    """None: nobody has it yet."""


@dataclass
class Loader:
    """Asks for kernels and loads them; `asking` and `running` say which calls do what.

    Attributes:
        device: where the calls' tensors are.
        loads: the variants, in the order in which they were asked for, by kernel and Triton's key.
    """

    device: torch.device
    loads: dict[tuple[str, str], Load] = field(default_factory=dict)
    _threads: ThreadPoolExecutor = field(init=False, repr=False)
    _futures: list[Future[None]] = field(default_factory=list, repr=False)
    _mine: int = field(default_factory=threading.get_ident, repr=False)
    _asks: bool = field(default=False, repr=False)
    _new: list[Load] = field(default_factory=list, repr=False)
    _here: threading.local = field(default_factory=threading.local, repr=False)

    @contextmanager
    def active(self, threads: int | None) -> Iterator[None]:
        """Within the block, see what Triton does, with so many threads that compile."""
        from triton import knobs

        def set_device() -> None:
            if self.device.type != "cpu":
                torch.get_device_module(self.device).set_device(self.device)

        self._threads = ThreadPoolExecutor(threads or min(32, os.cpu_count() or 1), initializer=set_device)
        with self._threads, knobs.runtime.scope(), knobs.compilation.scope():
            knobs.runtime.jit_cache_hook = self._before
            knobs.compilation.listener = self._after
            yield

    @contextmanager
    def asking(self) -> Iterator[list[Load]]:
        """Within the block, launches end before they begin, and what they ask for begins to load."""
        self._asks = True
        try:
            with self.seeing() as new:
                yield new
        finally:
            self._asks = False

    @contextmanager
    def seeing(self) -> Iterator[list[Load]]:
        """Within the block, collect the variants that were not asked for before."""
        new: list[Load] = []
        self._new = new
        yield new

    def wait(self, progress: Callable[[str, int, int], None]) -> None:
        """Wait until all that was asked for is there; what could not be had is compiled when it is launched."""
        for number, future in enumerate(as_completed(self._futures), 1):
            future.exception()
            progress("compiling, or reading from disk", number, len(self._futures))

    def _before(self, *_: object, key: str, fn: Any, compile: Any, **__: object) -> bool:
        """Triton's hook: it has no such variant in this process; True ends the launch."""
        if threading.get_ident() != self._mine:
            return False
        call = current_call()
        name = f"{fn.module}.{fn.name}"
        if (name, key) not in self.loads:
            load = Load(name, call[0].qualname if call else "")
            self.loads[name, key] = load
            self._new.append(load)
            if self._asks:
                data = compile["specialization_data"]
                self._futures.append(self._threads.submit(self._load, load, fn.jit_function, data))
        if not self._asks:
            self._here.load = self.loads[name, key]
        return self._asks

    def _load(self, load: Load, function: Any, data: str) -> None:
        self._here.load = load
        begin = time.perf_counter()
        function.preload(data)
        load.seconds = time.perf_counter() - begin

    def _after(self, *_: object, cache_hit: bool, times: Any, **__: object) -> None:
        """Triton's listener: a variant is there."""
        if (load := getattr(self._here, "load", None)) is not None:
            load.from_disk = cache_hit
            load.seconds = load.seconds or times.total / 1e6
