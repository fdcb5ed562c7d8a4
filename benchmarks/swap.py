"""Swapping the backend under CUDA graphs: torch.compile(mode="reduce-overhead") over a small model.

Only the numbers show what a replayed graph runs. So the second backend marks its outputs, by adding 1, and
every reading is compared with an eager one on each backend. The caches go on from reading to reading.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.decoder import Decoder
from mamba_ops import causal_conv1d_update, record_selections, selective_state_update, use_backend
from mamba_ops.commands.demo.run import TOLERANCE
from mamba_ops.commands.watch import CompilerWatch, device_name, watch_compiler
from mamba_ops.registry import Backend

BASE, MARKER = "triton", "marker"
READINGS = (BASE, MARKER, BASE, MARKER, BASE)
STEPS, STREAMS = 6, 4


@dataclass(frozen=True)
class Reading:
    """A few steps of the compiled model on one backend.

    Attributes:
        asked: the name given to use_backend().
        ran: the backends whose eager results are these, by the numbers.
        launches: runs of an op that Python saw; replays are not among them.
        recordings: CUDA graphs recorded during it.
        difference: how far the results are from the eager ones on the backend asked for, relative to the largest.
    """

    asked: str
    ran: list[str]
    launches: int
    recordings: int
    difference: float


@contextmanager
def marker_backend() -> Iterator[None]:
    """Within the block, there is a backend that runs the base's kernels and adds 1 to each output."""
    marker = Backend(MARKER, devices=None, priority=-100)
    try:
        for op in (causal_conv1d_update, selective_state_update):
            marker.implements(op)(_marked(op.kernels[BASE].function))
        yield
    finally:
        marker.remove()


def _marked(kernel: Callable[..., None]) -> Callable[..., None]:
    @wraps(kernel)
    def run(*args: Any, output: Tensor, **kwargs: Any) -> None:
        kernel(*args, output=output, **kwargs)
        output.add_(1)

    return run


def swap(device: torch.device) -> tuple[list[Reading], CompilerWatch, int]:
    """Read on one backend after the other; return what was read, what was compiled, and how often Inductor refused."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    model = Decoder(STREAMS).to(device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    readings: list[Reading] = []
    with torch.no_grad(), marker_backend(), watch_compiler() as watch:
        for backend in READINGS:
            text = torch.randint(256, (STEPS, STREAMS), device=device)
            before = [cache.clone() for cache in model.buffers()]
            expected = {}
            for name in (BASE, MARKER):
                expected[name] = _read(model, model, text, name)
                for cache, value in zip(model.buffers(), before, strict=True):
                    cache.copy_(value)
            recordings = watch.recordings
            with record_selections() as record:
                got = _read(model, compiled, text, backend)
            off = {name: _difference(got, results) for name, results in expected.items()}
            ran = [name for name, difference in off.items() if difference <= TOLERANCE]
            readings.append(Reading(backend, ran, len(record), watch.recordings - recordings, off[backend]))
    return readings, watch, counters["inductor"]["cudagraph_skips"]


def _read(model: Decoder, step: Callable[[Tensor], Tensor], text: Tensor, backend: str) -> list[Tensor]:
    """Read a text on a backend; return the logits and the caches after it."""
    logits = []
    with use_backend(backend):
        for tokens in text:
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(step(tokens).clone())  # the next replay writes to the same memory
    return [torch.stack(logits), *(cache.clone() for cache in model.buffers())]


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))


def problems(readings: list[Reading], watch: CompilerWatch, skips: int) -> list[str]:
    """Return a sentence for each thing that is not as it should be."""
    found = []
    if (watch.graphs, watch.recompiles) != (1, 0):
        found.append(f"got {watch.graphs} graphs and {watch.recompiles} recompiles, expected one and none")
    if skips:
        found.append(f"Inductor gave up CUDA graphs {skips} times, expected never")
    for i, reading in enumerate(readings):
        if reading.ran != [reading.asked]:
            ran = " or ".join(reading.ran) or f"neither, off by {reading.difference:.1e}"
            found.append(f"reading {i + 1}: asked for {reading.asked}, the numbers say {ran}")
        new = reading.asked not in [earlier.asked for earlier in readings[:i]]
        if new and not reading.recordings:
            found.append(f"reading {i + 1}: nothing was recorded, the first time on {reading.asked}")
        if not new and (reading.recordings or reading.launches):
            what = f"{reading.recordings} recordings and {reading.launches} launches"
            found.append(f"reading {i + 1}: {what}, expected replays of the earlier recording")
    return found


def main() -> int:
    console = Console(width=120, highlight=False)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type != "cuda":
        console.print("benchmarks.swap needs a GPU with CUDA graphs; there is none here.")
        return 0
    readings, watch, skips = swap(device)
    title = f'torch.compile(mode="reduce-overhead"), torch {torch.__version__}, {device_name(device)}'
    table = Table("asked for", "ran", "off by", "CUDA graphs recorded", "launched from Python", title=title)
    every = 2 * len(Decoder(STREAMS).layers) * STEPS
    for reading in readings:
        launches = f"{reading.launches} of {every} kernels"
        ran = " or ".join(reading.ran) or "neither"
        table.add_row(reading.asked, ran, f"{reading.difference:.1e}", str(reading.recordings), launches)
    console.print(table)
    console.print(f"{watch.graphs} graph, {watch.recompiles} recompiles, {skips} CUDA graphs skipped")
    found = problems(readings, watch, skips)
    for problem in found:
        console.print(f"FAILED: {problem}")
    if not found:
        console.print("OK: every swap reached the graph, and going back replayed what was recorded before")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
