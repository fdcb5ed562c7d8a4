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
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mamba_ops.ops._triton import _triton, op_of, prepared
from mamba_ops.ops._triton.common import INTERPRETED, options
from mamba_ops.ops._triton.limits import Limits, limits_of

Launches = dict[str, dict[str, Any]]
"""Kernel name to its launch configuration: constexprs that are free to choose, warps and stages."""
TABLES = Path(__file__).parent / "configs"
_MOST = {"num_warps": 32, "num_stages": 16}
"""The most that a GPU has, or that makes sense; blocks go up to 65,536."""


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

    The rule takes static sizes (numbers, bools and strings) and returns the launches of all of an op's kernels. If it
    has a keyword `limits`, it is given those of the device. The decorated function takes the device's index (-1 for the
    CPU) before the sizes, and remembers its results.

    Args:
        free: for each kernel the names that a table may set: they make it fast or slow, and never wrong.
    """

    def decorate(rule: Callable[..., Launches]) -> Callable[..., Launches]:
        op, parameters = op_of(rule.__module__), inspect.signature(rule).parameters.values()
        names = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

        def by_rule(limits: Limits, *values: Any) -> Launches:
            return rule(*values, limits=limits) if len(names) < len(parameters) else rule(*values)

        @functools.cache
        def choose(device: int, *values: Any) -> Launches:
            sizes = dict(zip(names, values, strict=True))
            launches, source = by_rule(limits_of(device), *values), "rule"
            found, path = (forced[op], "tuning") if op in forced else _entry(op, family(device), sizes)
            for kernel, changes in (found or {}).items():
                _check(path, op, kernel, changes, tunable[op])
                launches[kernel] = launches[kernel] | changes
                source = path
            if op not in forced:
                chosen.append(Choice(op, family(device), sizes, launches, source))
            return {kernel: options(**launch) for kernel, launch in launches.items()}

        tunable[op] = {kernel: names.split() for kernel, names in free.items()}
        rules[op], choosers[op] = by_rule, choose
        return choose

    return decorate


tunable: dict[str, dict[str, list[str]]] = {}
"""Op to kernel to the names that a table may set; this and the next two have the ops whose launchers are imported."""
rules: dict[str, Callable[..., Launches]] = {}
"""Op to its rule, which takes the limits of a device before the sizes."""
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
    prepared.forget()


def forget_device() -> None:
    """Look at the device again, and choose all launches again: tests and `cold_start.fitting` change it."""
    family.cache_clear()
    limits_of.cache_clear()
    for op in rules:
        forget(op)


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
    if own and not Path(own).is_dir():
        _warn_of_folder(own)
    return [*([Path(own)] if own else []), TABLES]


@functools.cache
def _warn_of_folder(own: str) -> None:
    message = f"MAMBA_OPS_CONFIG_DIR: got {own}, expected a folder that exists; launches are chosen without it"
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def load(path: Path) -> dict[str, Any]:
    """Read a table: `{"kernels": {op: [{"sizes": {...}, "launches": {kernel: {...}}}, ...]}, ...}`.

    Raises:
        ValueError: it is none; the message has the path and what is wrong.
    """
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for op, entries in _object(_object(table, "the table").get("kernels"), "kernels").items():
            if not isinstance(entries, list):
                raise TypeError(f"kernels of {op} is no list")
            for entry in entries:
                _object(_object(entry, f"an entry of {op}").get("sizes"), f"sizes of {op}")
                for kernel, changes in _object(entry.get("launches"), f"launches of {op}").items():
                    _object(changes, f"launches of {op}, {kernel}")
    except FileNotFoundError:
        return {"kernels": {}}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: got {error}, expected a table of launches as `mamba-ops tune` writes it") from None
    return table


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is no object")
    return value


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
            expected = f"one of {', '.join(free[kernel])}" if free[kernel] else "nothing: its launch is as it must be"
            raise ValueError(f"{path}: {op}: {kernel}: got {name!r}, expected {expected}")
        most = _MOST.get(name, 1 << 16)
        if type(value) is not int or not 1 <= value <= most or (name != "num_stages" and value & (value - 1)):
            expected = f"{'a number' if name == 'num_stages' else 'a power of two'} up to {most}"
            raise ValueError(f"{path}: {op}: {kernel}: {name}: got {value!r}, expected {expected}")
