"""What a measurement reports beside its times: how often torch.compile compiled, and the device's name."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.utils import counters


@dataclass
class CompilerWatch:
    """What torch.compile has done since the watch began.

    Attributes:
        compiles: how often Dynamo compiled something.
        recompiles: how many of these were of code that it had compiled before.
        recordings: how many CUDA graphs Inductor recorded.
    """

    compiles: int = 0
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
        elif event.callback_trigger is CallbackTrigger.DYNAMO:
            self.compiles += 1
            self.recompiles += not event.compile_id.endswith("/0")


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
