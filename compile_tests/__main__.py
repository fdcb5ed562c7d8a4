"""The library's own gate: `python -m compile_tests [--device DEVICE]` prints op x check and layer x check as a table.

A device that is not present is traced as absent, in a child process: opcheck and copies are left out there.
"""

import argparse
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from compile_tests.test_layers import new_layer_on
from compile_tests.test_ops import STEPS
from mamba_ops import absent
from mamba_ops.audit import audit
from tests.harness import with_output
from tests.layers import HIDDEN, KINDS

CHECKS = ("opcheck", "one graph", "recompiles", "copies")
ROWS = (5, 6, 11)
Row = tuple[str, dict[str, str]]


def _call(op: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call


def _verdicts(report: Any) -> dict[str, str]:
    first = [graph for graph in report.graphs if graph.call == 0]
    breaks = report.failing(["break"])
    again = [finding for finding in report.failing(["recompile"]) if finding.cause != "size-one"]
    copies = report.failing(["copy"])
    return {
        "one graph": "yes" if len(first) == 1 and not breaks else f"NO: {len(first)} graphs",
        "recompiles": "none" if not again else f"NO: {again[0].op}",
        "copies": "none" if not copies else f"NO: {copies[0].message}",
    }


def _here(device: torch.device) -> list[Row]:
    rows = []
    for case in STEPS:
        op, step = case.values
        sample = op.make_samples(device)[0]
        try:
            sample = with_output(op, sample)
            arguments = dict(op.bind(sample.args, sample.kwargs))
            found = {"opcheck": _opcheck(op, arguments, device)}
        except Exception as error:
            found = {"opcheck": f"NO: {type(error).__name__}: {error}".partition("\n")[0][:80]}
        calls = [(s.args, dict(s.kwargs)) for s in map(step, ROWS)]
        found |= _audited(_call(op), calls, device)
        rows.append((op.name, found))
    for name in KINDS:
        layer = new_layer_on(name, device)
        calls = [((torch.randn(n, 37, HIDDEN),), {}) for n in ROWS]
        rows.append((f"layers.{type(layer).__name__}", {"opcheck": "-", **_audited(layer, calls, device)}))
    return rows


def _opcheck(op: Any, arguments: dict[str, Any], device: torch.device) -> str:
    arguments |= {name: torch.empty(0, device=device) for name in op.mutates if arguments[name] is None}
    positional = [arguments.pop(p.name) for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    torch.library.opcheck(op.overload, tuple(positional), arguments)
    return "yes"


def _audited(fn: Any, calls: list[Any], device: torch.device) -> dict[str, str]:
    (args, kwargs), *more = calls
    return _verdicts(audit(fn, *args, more_calls=more, device=device, dynamic=True, copies=True, **kwargs))


def traced(*, device: str) -> list[Any]:
    """In a child process: the same calls for a device that is not there."""
    rows = []
    targets: list[Any] = []
    for case in STEPS:
        op, step = case.values
        targets.append((op.name, _call(op), [(s.args, s.kwargs) for s in map(step, ROWS)]))
    for name in KINDS:
        layer = new_layer_on(name, "cpu")
        calls = [((torch.randn(n, 37, HIDDEN),), {}) for n in ROWS]
        targets.append((f"layers.{type(layer).__name__}", layer, calls))
    for name, fn, calls in targets:
        (args, kwargs), *more = calls
        found = _verdicts(audit(fn, *args, more_calls=more, device=device, dynamic=True, **kwargs))
        rows.append([name, {**found, "opcheck": "-", "copies": "-"}])
    return rows


def main() -> int:
    """Print the table; 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m compile_tests", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or xpu; one that is not here is traced as absent")
    device = torch.device(parser.parse_args().device)
    is_here = device.type == "cpu" or torch.get_device_module(device).is_available()
    with torch.no_grad():
        rows = _here(device) if is_here else absent.run("compile_tests.__main__:traced", device=device.type)
    table = Table(title=f"On {device}{'' if is_here else ', which is not present'}", title_justify="left")
    for heading in ("op or layer", *CHECKS):
        table.add_column(heading, overflow="fold")
    for name, found in rows:
        cells = [found.get(check, "-") for check in CHECKS]
        table.add_row(name, *(f"[red]{cell}[/red]" if cell.startswith("NO") else cell for cell in cells))
    Console(highlight=False).print(table)
    return int(any(cell.startswith("NO") for _, found in rows for cell in found.values()))


if __name__ == "__main__":
    sys.exit(main())
