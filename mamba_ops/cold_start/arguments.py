"""The arguments of a warm-up, checked and completed: device, dtypes, backends, progress."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mamba_ops.registry import Op
from mamba_ops.registry import backends as all_backends
from mamba_ops.registry.errors import unknown

Progress = Callable[[str, int, int], None]


def device_of(
    what: nn.Module | Op[...] | str | Sequence[Op[...] | str], device: torch.device | str | None
) -> torch.device:
    """Return the device to warm up, with its number if it can have one.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        found = None if device is None else torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected a device, as cuda or cuda:1") from None
    if found is None and isinstance(what, nn.Module):
        found = next((t.device for t in what.parameters() if t.device.type not in ("cpu", "meta")), None)
    if found is None:
        found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if found.type != "cpu" and not torch.get_device_module(found).is_available():
        raise ValueError(f"device: got {found}, which this machine does not have")
    if found.type != "cpu" and found.index is None:
        found = torch.device(found.type, torch.get_device_module(found).current_device())
    return found


def pairs_of(
    dtypes: Sequence[torch.dtype | tuple[torch.dtype | None, torch.dtype]] | None,
) -> list[tuple[torch.dtype | None, torch.dtype]]:
    """Return pairs of the dtypes of activations and of states.

    Raises:
        ValueError: neither dtypes nor pairs of them.
    """
    pairs: list[tuple[torch.dtype | None, torch.dtype]] = []
    for given in dtypes or (None,):
        pair = given if isinstance(given, tuple) else (given, torch.float32)
        if len(pair) != 2 or not isinstance(pair[1], torch.dtype) or not isinstance(pair[0], torch.dtype | None):
            expected = "dtypes, or pairs of one of activations and one of states"
            raise ValueError(f"warm_up: dtypes: got {given!r}, expected {expected}")
        pairs.append(pair)
    return pairs


def known_ops(what: Any) -> Any:
    """Return what to warm up: a module, or a list of ops and names.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(what, nn.Module):
        return what
    items = [what] if isinstance(what, (str, Op)) else what
    if not isinstance(items, Sequence) or not all(isinstance(item, (str, Op)) for item in items):
        expected = "a model, an op or its name, or a list of these"
        raise ValueError(f"warm_up: model_or_ops: got {what!r}, expected {expected}")
    return items


def check_numbers(sizes: Mapping[str, int], processes: int | None) -> None:
    """Raise ValueError unless sizes, and the number of processes, are positive numbers."""
    for name, number in {**sizes, "processes": 1 if processes is None else processes}.items():
        if not isinstance(number, int) or not 1 <= number < 2**31:
            raise ValueError(f"warm_up: {name}: got {number!r}, expected a positive number of 31 bits at most")


def check_names(sizes: Mapping[str, int], ops: Iterable[Op[...]]) -> None:
    """Raise the error about a static size that samples of none of the ops have."""
    parameters = (inspect.signature(op.sampler).parameters for op in ops)
    named = (p for found in parameters for p in [*found.values()][1:] if p.kind is not p.VAR_KEYWORD)  # but the device
    known = {p.name for p in named} - {"dtype", "state_dtype"}
    if stray := sizes.keys() - known:
        raise unknown("size", min(stray), known)


def known_backends(names: Sequence[str] | None) -> list[str | None]:
    """Return the requested backends, in lower case; None stands for the default order."""
    if names is None:
        return [None]
    known = {backend.name for backend in all_backends()}
    found = [name.lower() for name in ([names] if isinstance(names, str) else names)]
    for name in found:
        if name not in known:
            raise unknown("backend", name, known)
    return [*found]


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yield the function for progress: the caller's, one that draws bars, or one that does nothing."""
    if callable(progress):
        yield progress
    elif progress or (progress is None and sys.stderr.isatty() and importlib.util.find_spec("rich")):
        from rich.console import Console
        from rich.progress import Progress as Bars

        with Bars(console=Console(stderr=True), transient=True) as bars:
            tasks: dict[str, int] = {}

            def draw(step: str, done: int, total: int) -> None:
                if step not in tasks:
                    tasks[step] = bars.add_task(step)
                bars.update(tasks[step], completed=done, total=total)  # type: ignore[arg-type]

            yield draw
    else:
        yield lambda step, done, total: None
