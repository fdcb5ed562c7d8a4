"""Clocks: the time of calls on a device, by turns, and what the device does in a second at best."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from mamba_ops.ops._common.bench import nbytes, random
from mamba_ops.registry import noticing_swaps

FLUSHED = 256 << 20  # bytes, at least, that are written before each call: more than the L2 cache of a GPU
LEAST, MOST = 5, 200  # turns of each call

Call = Callable[[], object]


def by_turns(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
    seconds: float = 0.2,
) -> dict[str, float]:
    """Return the median microseconds of each call; all take their turns in one loop, so that a busy machine hits all.

    On a GPU the device's own time counts, and its L2 cache is cold before each. Each call has been made once before, so
    nothing is compiled here.

    Args:
        calls: by name.
        device: where they run.
        within: by name, in what a call is made; entering is not timed.
        seconds: for which each call may run; it has five turns at least, and 200 at most.
    """
    module, spent = torch.get_device_module(device), dict.fromkeys(calls, 0.0)
    found: dict[str, list[float]] = {name: [] for name in calls}
    waiting = dict(calls)
    clock = _events_of(device) or _host_clock(device)
    while waiting:
        taken = {}
        for name, call in waiting.items():
            with (within or {}).get(name, nullcontext)():
                taken[name] = clock(call)
        if device.type != "cpu":
            module.synchronize()
        for name, read in taken.items():
            us = read()
            found[name].append(us)
            spent[name] += 1e-6 * us
            if len(found[name]) >= MOST or (len(found[name]) >= LEAST and spent[name] >= seconds):
                del waiting[name]
    return {name: statistics.median(times) for name, times in found.items()}


def _events_of(device: torch.device) -> Callable[[Call], Callable[[], float]] | None:
    """Return a clock of the device's own events, with a cold cache; None where there are none."""
    if device.type in ("cpu", "mps"):
        return None
    module: Any = torch.get_device_module(device)
    cache = getattr(module.get_device_properties(device), "L2_cache_size", 0)
    flushed = torch.empty(max(FLUSHED, 2 * cache), dtype=torch.int8, device=device)

    def clock(call: Call) -> Callable[[], float]:
        begin, end = (module.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        begin.record()
        call()
        end.record()
        return lambda: 1e3 * float(begin.elapsed_time(end))

    return clock


def _host_clock(device: torch.device) -> Callable[[Call], Callable[[], float]]:
    """Return a clock from a call's launch to its end; of many calls, where one is short."""
    repeats: dict[Call, int] = {}

    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()

    def clock(call: Call) -> Callable[[], float]:
        number = repeats.get(call, 1)
        wait()
        begin = time.perf_counter()
        for _ in range(number):
            call()
        wait()
        took = (time.perf_counter() - begin) / number
        repeats.setdefault(call, max(1, min(100, int(1e-3 / max(took, 1e-9)))))
        return lambda: 1e6 * took

    return clock


@contextmanager
def captured(calls: Call, device: torch.device) -> Iterator[Call]:
    """Yield what replays the calls without the host: one graph of them, where the device has such, else themselves.

    They are made once before.
    """
    module: Any = torch.get_device_module(device)
    calls()
    if device.type == "cpu" or not hasattr(module, "CUDAGraph"):
        yield calls
        return
    module.synchronize()
    graph = module.CUDAGraph()
    with noticing_swaps(), module.graph(graph):  # freed before the next swap
        calls()
    try:
        yield graph.replay
    finally:
        del graph


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second, read and written, of a large copy on the device."""
    source = torch.randn(1 << (26 if device.type == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    return 2 * nbytes(source) / (1e-6 * by_turns({"copy": lambda: target.copy_(source)}, device)["copy"])


def product_rate(device: torch.device) -> float:
    """Return the floating-point operations a second of a large product of matrices, in the activations' dtype."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = random(size, size, device=device), random(size, size, device=device)
    out = left @ right
    us = by_turns({"product": lambda: torch.mm(left, right, out=out)}, device)["product"]
    return 2 * size**3 / (1e-6 * us)


def exponential_rate(device: torch.device) -> float | None:
    """Return the exponentials a second of the device, of a kernel that does little else.

    None without Triton, and on a CPU, where how fast they are is a matter of how exact.
    """
    if device.type == "cpu":
        return None
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    def chain(out, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
        value = at.to(tl.float32) * 1e-9
        for _ in range(STEPS):
            value = tl.exp2(-value)
        tl.store(out + at, value)

    kernel, programs, steps = triton.jit(chain), 4096, 512
    chain.__globals__["tl"] = tl  # Triton looks names up there
    out = torch.empty(1024 * programs, device=device)

    def run() -> None:
        kernel[(programs,)](out, STEPS=steps)

    run()
    return out.numel() * steps / (1e-6 * by_turns({"exp": run}, device)["exp"])
