"""Facts that measurements report beside times: how often torch.compile compiled, and the device's name."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mamba_ops.audit import _torch
from mamba_ops.config import device_kind


@dataclass
class CompilerWatch:
    """What torch.compile has done since the watch began.

    Attributes:
        recordings: how many CUDA graphs Inductor recorded.
    """

    recordings: int = 0
    _ids: list[str] | None = field(default_factory=list)
    _graphs_before: int = field(default_factory=_torch.graph_count)

    @property
    def graphs(self) -> int:
        """How many graphs Dynamo made."""
        return _torch.graph_count() - self._graphs_before

    @property
    def compiles(self) -> int:
        """How often Dynamo compiled something."""
        return len(self._compile_ids)

    @property
    def recompiles(self) -> int:
        """How many of these were of code that it had compiled before."""
        return sum(not compile_id.endswith("/0") for compile_id in self._compile_ids)

    @property
    def _compile_ids(self) -> list[str]:
        """An id is the number of the code, a slash, and how often that was compiled before."""
        return self._ids if self._ids is not None else _torch.compile_ids()


@contextmanager
def watch_compiler() -> Iterator[CompilerWatch]:
    """Within the block, count what torch.compile does."""
    watch = CompilerWatch()
    ids: list[str] = []

    def note(trigger: str, compile_id: str) -> None:
        if trigger == "CUDAGRAPH_RECORDING":
            watch.recordings += 1
        elif trigger == "DYNAMO":
            ids.append(compile_id)

    with _torch.on_compile(note) as called:
        watch._ids = ids if called else None
        if not called:
            _torch.forget_compiles()
        yield watch


def device_name(device: torch.device) -> str:
    """Return what a report calls a device: the GPU's name, or the CPU's and its number of cores."""
    if device.type != "cpu":
        return device_kind(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
