"""Shared by the benchmarks of kernels: inputs, clocks, and the page that each writes."""

import argparse
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from mamba_ops.commands.bench.clocks import by_turns, captured

MIXED = (37, 512, 1024, 77, 2048, 300, 900, 64, 128, 1500, 33, 256, 700, 444, 130, 39)  # tokens of 16 packed sequences

LABELS = ("case", "kernels", "layer", "model", "compiled")  # columns of words

Row = dict[str, Any]
"""What was measured, by key."""


def bench_us(call: Callable[[], object]) -> float:
    """Median of one eager call as the accelerator sees it, its L2 cache cold."""
    device = torch.accelerator.current_accelerator()
    assert device is not None
    call()
    return by_turns({"call": call}, device)["call"]


def device_us(calls: Callable[[], object], device: torch.device) -> float:
    """Time of the calls on the device alone: recorded in one CUDA graph, where there are such, and replayed."""
    with captured(calls, device) as replay:
        return by_turns({"calls": replay}, device)["calls"]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects what Triton compiles, or loads from its cache on disk, within the block."""
    from triton import knobs

    compiled: list[str] = []

    def note(*_: object, repr: str, **__: object) -> None:
        compiled.append(repr)

    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = note
        yield compiled


# ---- the command and its page ----------------------------------------------------------------------------------------


def options(name: str, description: str, ops: Iterable[str]) -> argparse.Namespace:
    """Return the arguments of `python -m benchmarks.<name>`. On a CPU, Triton is set to interpret before it is
    imported, as it reads the variable when it decorates kernels."""
    default = torch.accelerator.current_accelerator() or torch.device("cpu")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.partition("\n")[0])
    parser.add_argument("--op", choices=list(ops), help="this op alone")
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    add_outputs(parser)
    given = parser.parse_args()
    given.name = name
    if given.device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    return given


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that `report` reads."""
    results = Path(__file__).parent / "results"
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )


def command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the command, without options that figures do not depend on, such as output files."""
    given = {n: v for n, v in vars(options).items() if n not in ("json", "save") and v != parser.get_default(n)}
    words = [
        f"--{n}" if v is True else f"--{n} {' '.join(map(str, v)) if isinstance(v, (list, tuple)) else v}"
        for n, v in given.items()
    ]
    return " ".join([parser.prog, *words])


def facts(options: argparse.Namespace) -> dict[str, Any]:
    import triton

    device = options.device
    return {
        "command": f"python -m benchmarks.{options.name}{f' --op {options.op}' if options.op else ''}",
        "date": date.today().isoformat(),
        "device": "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def number(row: Row, key: str, unit: float = 1, digits: int = 1) -> str:
    return f"{row[key] / unit:.{digits}f}" if key in row else "-"


def ratio(row: Row, key: str, base: str) -> str:
    return f"{row[key] / row[base]:.2f}" if key in row and base in row else "-"


def page(
    title: str,
    facts: Mapping[str, Any],
    tables: Mapping[str, tuple[dict[str, Callable[[Row], str]], list[Row]]],
    notes: Iterable[str],
) -> str:
    """A markdown page: for every op its table, of columns and rows, then the notes and the command."""
    text = io.StringIO()
    console = Console(file=text, width=1000, markup=False, highlight=False)  # no cell is cut, in a log or in a terminal
    console.print(f"# {title} on {facts['device']}, {facts['date']}")
    for op, (columns, rows) in tables.items():
        table = Table(box=MARKDOWN)
        for column in columns:
            table.add_column(column, justify="left" if column in LABELS else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(cell(row) for cell in columns.values()))
        console.print(f"\n## {op}", table)
    for note in (*notes, f"`{facts['command']}`"):
        console.print(f"- {note}")
    return re.sub(r" +\n", "\n", text.getvalue())


def bandwidth_note(bytes_a_second: float) -> str:
    return f"a copy of 1 GiB on the device moves {bytes_a_second / 1e12:.2f} TB/s, read and written"


def report(options: argparse.Namespace, text: str, results: dict[str, Any]) -> None:
    """Print the page, and write what was asked for."""
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"[^A-Za-z0-9]+", "-", results["device"])
        (options.save / f"{results['date']}_{device}_{options.name}.md").write_text(text)
    print(text)
