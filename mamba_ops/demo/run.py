"""Three readings of one text, and what they show: `run_demo` returns it as data."""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.utils import counters

from mamba_ops import record_selections, use_backend
from mamba_ops.demo.boundary import Boundary, measure_boundary
from mamba_ops.demo.loop import loop_backend
from mamba_ops.demo.model import Decoder
from mamba_ops.registry import backends, ops

TOLERANCE = 1e-4  # of the largest logit; sums in another order change a logit by about 1e-6 of it


class DemoError(ValueError):
    """The demo was asked for what it cannot show; the message is a sentence for the user."""


# -- the report -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One reading of the whole text.

    Attributes:
        name: "eager", "compiled" or "compiled, swapped".
        graphs, recompiles: how many there have been from the demo's start to the end of this run.
        first_step_s: seconds of the first step, which is the one that compiles.
        tokens_per_s: speed of the other steps.
        kernel_calls: how many runs of an op each backend took.
        difference: the largest difference of a logit from the eager run's.
        same_predictions: the share of next bytes that are predicted as in the eager run.
    """

    name: str
    graphs: int
    recompiles: int
    first_step_s: float
    tokens_per_s: float
    kernel_calls: Mapping[str, int]
    difference: float
    same_predictions: float


@dataclass(frozen=True)
class DemoReport:
    """What the demo saw.

    Attributes:
        device: what ran it.
        streams, steps: the text was read as so many streams of so many bytes.
        swap_to: the backend that the last run changed to in the middle.
        tolerance: how far a logit may be from the eager run's.
        runs: the three readings.
        boundary: what the front adds to a call.
    """

    device: str
    streams: int
    steps: int
    swap_to: str
    tolerance: float
    runs: tuple[Run, ...]
    boundary: Boundary

    @property
    def problems(self) -> list[str]:
        """A sentence for each thing that is not as it should be."""
        last = self.runs[-1]
        found = [
            f"{run.name}: a logit is {run.difference:.2g} off, expected at most {self.tolerance:.2g}"
            for run in self.runs
            if not run.difference <= self.tolerance  # NaN is wrong too
        ]
        if last.graphs != 1:
            found.append(f"{last.graphs} graphs were compiled, expected 1")
        if last.recompiles:
            found.append(f"{last.recompiles} recompiles, expected none")
        if self.swap_to not in last.kernel_calls or len(last.kernel_calls) == 1:
            found.append(f"{last.name}: ran on {', '.join(last.kernel_calls)}, expected two, {self.swap_to} the second")
        return found


# -- the runs ---------------------------------------------------------------------------------------------------------


def run_demo(
    text: bytes,
    *,
    device: torch.device | str = "cpu",
    swap_to: str | None = None,
    tokens: int = 256,
    streams: int = 4,
    track: Callable[[Iterable[int], str], Iterable[int]] = lambda steps, name: steps,
) -> DemoReport:
    """Read a text three times (eager, compiled, compiled with another backend from the middle on) and compare.

    It resets torch.compile. While it runs there is one backend more, called `loop`.

    Args:
        text: read as several streams at once, each beginning where the one before it ends.
        device: where to run.
        swap_to: the backend to change to; None: the next in the default order.
        tokens: how many bytes of each stream to read, at most.
        streams: rows of the batch.
        track: wraps the steps of each run, given its name; for a progress bar.

    Raises:
        DemoError: the text is too short, or there is nothing to swap to.
        RegistryError: there is no such backend, or it refuses.
    """
    device = torch.device(device)
    steps = min(tokens, len(text) // streams)
    if steps < 4:
        raise DemoError(f"got {steps} bytes for each of {streams} streams, expected at least 4 to read")
    read = torch.tensor(list(text[: streams * steps]), device=device).view(streams, steps).t().contiguous()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(streams).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)

    runs: list[Run] = []
    with torch.no_grad(), _one_thread(), loop_backend(), watch_compiler() as watch:
        other = _partner(swap_to, lambda: model(read[0]), device)
        for name, step, swap in (
            ("eager", model, None),
            ("compiled", compiled, None),
            ("compiled, swapped", compiled, other),
        ):
            model.forget()
            reading = _read(read, step, swap, track(range(steps), name))
            if not runs:
                eager = reading.logits
            difference = (reading.logits - eager).abs().max()
            same = (reading.logits.argmax(-1) == eager.argmax(-1)).float().mean()
            runs.append(Run(name, watch.graphs, watch.recompiles, *reading[1:], float(difference), float(same)))
    tolerance = TOLERANCE * float(eager.abs().max())
    return DemoReport(device_name(device), streams, steps, other, tolerance, tuple(runs), measure_boundary(device))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the block, use one core: a step here is too little work to share among several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _partner(name: str | None, step: Callable[[], object], device: torch.device) -> str:
    """Return the backend to swap to, after one step on it: what it refuses is said before anything is compiled."""
    with record_selections() as record:
        step()
    running = {selection.backend for selection in record}
    needed = [op for op in ops().values() if op.qualname in {selection.op for selection in record}]
    others = [
        b.name
        for b in backends()
        if b.why_unusable(device.type) is None and b.name not in running and all(b.name in op.kernels for op in needed)
    ]
    name = name.lower() if name else others[0]
    if running == {name}:
        raise DemoError(f"{name} runs here anyway, expected a backend to swap to: {', '.join(others)}")
    with use_backend(name):
        step()
    return name


class _Reading(NamedTuple):
    logits: Tensor  # (steps, streams, 256)
    first_step_s: float
    tokens_per_s: float
    kernel_calls: Counter[str]


def _read(text: Tensor, step: Callable[[Tensor], Tensor], swap_to: str | None, steps: Iterable[int]) -> _Reading:
    """Read a text `(steps, streams)` once; from the middle on with another backend, if one is named."""
    count, streams = text.shape
    synchronize = torch.get_device_module(text.device).synchronize
    logits: list[Tensor] = []
    moments = [time.perf_counter()]
    with record_selections() as record, ExitStack() as swapped:
        for i in steps:
            if swap_to is not None and i == count // 2:
                swapped.enter_context(use_backend(swap_to))
            logits.append(step(text[i]))
            if i in (0, count - 1):
                synchronize()
                moments.append(time.perf_counter())
    start, first, end = moments
    kernel_calls = Counter(selection.backend for selection in record)
    return _Reading(torch.stack(logits), first - start, streams * (count - 1) / (end - first), kernel_calls)


# -- what it stands on, and the benchmarks too ------------------------------------------------------------------------


@dataclass
class CompilerWatch:
    """What torch.compile has done since somebody watches.

    Attributes:
        recompiles: how often Dynamo compiled code that it had compiled before.
        recordings: how many CUDA graphs Inductor recorded.
    """

    recompiles: int = 0
    recordings: int = 0
    _graphs_before: int = field(default_factory=lambda: counters["stats"]["unique_graphs"])

    @property
    def graphs(self) -> int:
        """How many graphs Dynamo made."""
        return counters["stats"]["unique_graphs"] - self._graphs_before

    def note(self, event: CallbackArgs) -> None:
        """Count one event; a compile's id is the number of the code, a slash, and how often it was compiled before."""
        if event.callback_trigger is CallbackTrigger.CUDAGRAPH_RECORDING:
            self.recordings += 1
        elif event.callback_trigger is CallbackTrigger.DYNAMO and not event.compile_id.endswith("/0"):
            self.recompiles += 1


@contextmanager
def watch_compiler() -> Iterator[CompilerWatch]:
    """Within the block, count what torch.compile does."""
    watch = CompilerWatch()
    note = callback_handler.register_start_callback(watch.note)
    try:
        yield watch
    finally:
        callback_handler.remove_start_callback(note)


def device_name(device: torch.device) -> str:
    """Return what a report calls a device: the GPU's name, or the CPU's and its number of cores."""
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def read_text(path: Path | None = None) -> bytes:
    """Return the bytes of a file, or else of this project's README: the checkout's or the installed package's."""
    checkout = Path(__file__).parents[2]
    if path is None and (checkout / "pyproject.toml").is_file():
        path = checkout / "README.md"
    if path is not None:
        return path.read_bytes()
    try:
        return str(metadata("mamba-ops").json.get("description", "")).encode()
    except PackageNotFoundError:
        raise DemoError("got no text, expected the README of a checkout or an installed package; name a file") from None
