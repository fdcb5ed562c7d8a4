"""Launch configurations: blocks, warps and stages of every kernel, from a table for the device, else by a rule.

A table is `<family>.json`, in the folder that MAMBA_OPS_CONFIG_DIR names or in `configs/` here; the former comes first.
It has the static sizes that were measured. For all others, and for unknown devices, there is the rule, a formula beside
the kernels. Nothing is timed on a call, and the choice is made once for a device and static sizes, so it is the same on
every rank and in every run.
"""

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mamba_ops.ops._triton import _triton, op_of
from mamba_ops.ops._triton.common import INTERPRETED

Launches = dict[str, dict[str, Any]]
"""Kernel name to its launch configuration: constexprs that are free to choose, warps and stages."""
TABLES = Path(__file__).parent / "configs"


class Choice(NamedTuple):
    """The launches chosen for an op's static sizes on a device family."""

    op: str
    family: str
    sizes: Mapping[str, Any]
    launches: Launches
    source: str
    """The table's path, or "rule"."""

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.sizes.items())
        launches = "; ".join(
            f"{kernel} {', '.join(f'{n} {v}' for n, v in launch.items())}" for kernel, launch in self.launches.items()
        )
        return f"{self.op} on {self.family}, {sizes}: {launches} ({self.source})"


chosen: list[Choice] = []
"""All choices of this process."""
forced: dict[str, Launches] = {}
"""Launches that tuning tries now, by op: they come before tables and rules."""


def tunable_launch(**free: str) -> Callable[[Callable[..., Launches]], Callable[..., Launches]]:
    """Make a rule's launches tunable: a table's come first.

    The rule takes static sizes (numbers, bools and strings) and returns the launches of all of an op's kernels. The
    decorated function takes the device's index (-1 for the CPU) before them, and remembers its results.

    Args:
        free: for each kernel the names that a table may set: they make it fast or slow, and never wrong.
    """

    def decorate(rule: Callable[..., Launches]) -> Callable[..., Launches]:
        op, names = op_of(rule.__module__), list(inspect.signature(rule).parameters)

        @functools.cache
        def choose(device: int, *values: Any) -> Launches:
            sizes = dict(zip(names, values, strict=True))
            launches, source = rule(*values), "rule"
            found, path = (forced[op], "tuning") if op in forced else _entry(op, family(device), sizes)
            for kernel, changes in (found or {}).items():
                _check(path, op, kernel, changes, tunable[op])
                launches[kernel] = launches[kernel] | changes
                source = path
            if op not in forced:
                chosen.append(Choice(op, family(device), sizes, launches, source))
            return launches

        tunable[op] = {kernel: names.split() for kernel, names in free.items()}
        rules[op], choosers[op] = rule, choose
        return choose

    return decorate


tunable: dict[str, dict[str, list[str]]] = {}
"""Op to kernel to the names that a table may set; this and the next two have the ops whose launchers are imported."""
rules: dict[str, Callable[..., Launches]] = {}
"""Op to the rule as it was written."""
choosers: dict[str, Any] = {}
"""Op to the decorated rule."""


def force(op: str, launches: Launches | None) -> None:
    """Launch an op like this, whatever its table says, until a call with None; for tuning."""
    if launches is None:
        forced.pop(op, None)
    else:
        forced[op] = launches
    forget(op)


def forget(op: str) -> None:
    """Choose again at the op's next call, as its table may have changed."""
    choosers[op].cache_clear()
    _table.cache_clear()


@functools.cache
def family(device: int) -> str:
    """Return the name of a device's family: devices of one family run the same binaries (`cuda-90`, `hip-gfx942`)."""
    if INTERPRETED:
        return "interpreted"
    with torch.accelerator.device_index(device if device >= 0 else None):
        return _triton.device_family()


def folders() -> list[Path]:
    """Return the folders that have tables, in the order in which they are looked at."""
    own = os.environ.get("MAMBA_OPS_CONFIG_DIR")
    return [*([Path(own)] if own else []), TABLES]


def load(path: Path) -> dict[str, Any]:
    """Read a table: `{"kernels": {op: [{"sizes": {...}, "launches": {kernel: {...}}}, ...]}, ...}`."""
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table["kernels"], dict):
            raise TypeError("kernels is no object")
    except FileNotFoundError:
        return {"kernels": {}}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: got {error}, expected a table of launches as `mamba-ops tune` writes it") from None
    return table


@functools.cache
def _table(path: Path) -> dict[str, Any]:
    return load(path)


def _entry(op: str, family: str, sizes: Mapping[str, Any]) -> tuple[Launches | None, str]:
    for folder in folders():
        path = folder / f"{family}.json"
        for entry in _table(path)["kernels"].get(op, ()):
            if entry["sizes"] == sizes:
                return entry["launches"], str(path)
    return None, "rule"


def _check(path: str, op: str, kernel: str, changes: Mapping[str, Any], free: Mapping[str, list[str]]) -> None:
    """Raise ValueError if a table sets something that it may not."""
    if kernel not in free:
        raise ValueError(f"{path}: {op}: got kernel {kernel!r}, expected one of {', '.join(sorted(free))}")
    for name, value in changes.items():
        if name not in free[kernel]:
            raise ValueError(f"{path}: {op}: {kernel}: got {name!r}, expected one of {', '.join(free[kernel])}")
        if not isinstance(value, int) or value < 1 or (name != "num_stages" and value & (value - 1)):
            raise ValueError(f"{path}: {op}: {kernel}: {name}: got {value!r}, expected a power of two")
