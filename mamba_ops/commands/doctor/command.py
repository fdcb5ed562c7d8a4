"""`mamba-ops doctor`: one screen of text, to read and to paste into an issue."""

import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from mamba_ops.commands.doctor import facts
from mamba_ops.commands.options import Sizes, failing, read_sizes


def doctor(
    target: Annotated[
        str | None,
        typer.Option(metavar="GPU", help="Show what fits a GPU that need not be here: sm_86, 8.6, gfx942."),
    ] = None,
    size: Sizes = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="Show what fits this machine's GPU; compiles for about a minute.")
    ] = False,
) -> None:
    """Say what there is on this machine, what works and why the rest does not; what fits a GPU; what to install."""
    console = Console(highlight=False, markup=False)
    with failing(ValueError):
        sizes = read_sizes(size)
        here, *_ = facts.all_devices()
        if sizes and target is None and not fit:
            raise ValueError("--size: got sizes without --target or --fit, expected one of these to show what fits")
        if target is not None:
            from mamba_ops.cold_start.targets import target_of

            _show_fits(console, target_of(target), sizes)
            return
        _show(console)
        if fit:
            found = facts.target_here(here)
            if found is None:
                raise ValueError("--fit: got no GPU that Triton compiles for, expected one; --target names one")
            _show_fits(console, found, sizes)


def _show(console: Console) -> None:
    installed, (here, *others) = facts.versions(), facts.all_devices()
    found = facts.backends_on(here)
    refused = {name: reason for name, reason in found.items() if reason != "works"}
    _section(console, "Versions", installed)
    _section(console, "Devices", {str(device): _tried(facts.described, device) for device in (here, *others)})
    _section(console, f"Backends on {here}", found)
    _section(console, "Caches", facts.caches())
    _section(console, "Launches", {"triton": _tried(facts.launches, here)})
    _list(console, "Known faults of these versions", facts.faults(installed))
    _list(console, "What to do", facts.advice(here, installed, refused))


def _tried(fact: Callable[[Any], str], device: Any) -> str:
    """Return a fact, or why it could not be found out: a doctor looks at machines on which things fail."""
    try:
        return fact(device)
    except Exception as error:
        return f"not known: {type(error).__name__}: {error}"


def _section(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print a title, and a line for each name."""
    console.print(title)
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        _line(console, f"{name:<{width}}", value)


def _list(console: Console, title: str, sentences: Iterable[str]) -> None:
    """Print a title, and a line for each sentence."""
    console.print(title)
    for sentence in list(sentences) or ["none"]:
        _line(console, "-", sentence)


def _line(console: Console, name: str, value: str) -> None:
    """Print a name and a value; what is long goes on under itself, a long path in one piece."""
    lines = textwrap.wrap(value, max(console.width - len(name) - 4, 20), break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        console.print(f"  {name if number == 0 else ' ' * len(name)}  {line}", soft_wrap=True)


def _show_fits(console: Console, target: Any, sizes: Mapping[str, int]) -> None:
    """Print a table of ops and dtypes, then a line for each kernel that does not fit."""
    from mamba_ops.cold_start.fitting import DTYPES

    console.print(f"{target.name}: {target.shared_memory:,} bytes of shared memory for a program of Triton's")
    rows = list(facts.fits(target, sizes))
    ops = list(dict.fromkeys(row.op for row in rows))
    width = max(map(len, ops))
    console.print("  " + " " * width + "".join(f"  {dtype:>9}" for dtype in DTYPES))
    for op in ops:
        cells = []
        for dtype in DTYPES:
            mine = [row for row in rows if (row.op, row.dtype) == (op, dtype)]
            most = max((row.shared for row in mine), default=0)
            cells.append(f"{most:,}" if all(row.fits for row in mine) else "torch")
        console.print(f"  {op:<{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    console.print(
        "Bytes of the kernel that takes the most, with float32 states, and narrow ones where an op takes them; "
        "`torch`: a kernel does not fit, so ops run on torch there:"
    )
    refused = [row for row in rows if not row.fits]
    for row in refused:
        asks = row.problem or f"{row.shared:,} bytes"
        console.print(f"  {row.kernel} of {row.op}, {row.dtype}: {asks}", soft_wrap=True)
    if not refused:
        console.print("  none")
