"""The library's own gate: `python -m compile_tests [--device DEVICE]` prints op x check and layer x check as a table.

A device that is not present is traced as absent, in a child process: what runs kernels or Inductor is left out there.
The layers come as such and on an engine's mixed batches, with a plan. `--against-torch TARGET` compares instead what an
audit says with what torch logs; `--models` prints what models of Transformers do.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compile_tests import against_torch
from compile_tests.test_layers import new_layer_on
from compile_tests.test_ops import DAILY_STEPS, step
from compile_tests.test_plans import caches_of, random_plans
from mamba_ops.audit import Report, absent, audit
from mamba_ops.registry import Op, splitting_ops
from tests.layers import HIDDEN, KINDS
from tests.test_layers_plan import HIDDEN as PLAN_HIDDEN
from tests.test_layers_plan import LAYERS

CHECKS = ("opcheck", "compiled = eager", "one graph", "recompiles", "copies", "splits at")
ROWS = (5, 6, 11)
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Subject(NamedTuple):
    """What the checks are about: its name, what is called, with what, and the op if it is one."""

    name: str
    fn: Callable[..., Any]
    calls: list[Call]
    op: Op[...] | None = None


def subjects(device: torch.device | str) -> Iterator[Subject]:
    """Yield every op, and every layer with and without a plan, with calls of several sizes."""
    for op, pattern in DAILY_STEPS.items():
        samples = [step(op, pattern, rows) for rows in ROWS]
        yield Subject(op.name, _front(op), [(s.args, dict(s.kwargs)) for s in samples], op)
    for name in KINDS:
        layer = new_layer_on(name, device)
        calls: list[Call] = [((torch.randn(n, 37, HIDDEN),), {}) for n in ROWS]
        yield Subject(f"layers.{type(layer).__name__}", layer, calls)
    for name, make in LAYERS.items():
        if "," not in name:  # those are variants
            planned: Any = make().to(device)
            calls = [
                ((torch.randn(plan.tokens, PLAN_HIDDEN), *caches_of(planned)), {"plan": plan})
                for plan in random_plans(device, 3)
            ]
            yield Subject(f"layers.{type(planned).__name__}, plan", planned, calls)


def _front(op: Op[...]) -> Callable[..., Any]:
    """A function of its own for each op: Dynamo keeps what it compiled by code object."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call


def check(subject: Subject, device: torch.device, *, here: bool, copies: bool = True) -> dict[str, str]:
    """Return what each check says; those for copies take longest."""
    (args, kwargs), *more = subject.calls
    found = dict.fromkeys(CHECKS, "-")
    if here and subject.op is not None:
        found["opcheck"] = _tried(_opcheck, subject.op, device)
    if here:
        found["compiled = eager"] = _tried(_same, subject, device)
    copies = copies and here
    try:
        report = audit(subject.fn, *args, more_calls=more, device=device, dynamic=True, copies=copies, **kwargs)
    except Exception as error:
        return found | {"one graph": _failed(error)}
    return found | verdicts(report, copies=copies)


def verdicts(report: Report, *, copies: bool) -> dict[str, str]:
    """Read the report of an audit."""
    first = [graph for graph in report.graphs if graph.call == 0]
    breaks = report.failing(["break"])
    again = [finding for finding in report.failing(["recompile"]) if finding.cause != "size-one"]
    copied = report.failing(["copy"])
    cuts = dict.fromkeys(str(segment.splitting) for graph in first for segment in graph.segments if segment.splitting)
    return {
        "one graph": "yes" if len(first) == 1 and not breaks else f"NO: {len(first)} graphs",
        "recompiles": "none" if not again else f"NO: {again[0].op}",
        "copies": "-" if not copies else "none" if not copied else f"NO: {copied[0].message}",
        "splits at": ", ".join(cut.rpartition("::")[2] for cut in cuts if cut in splitting_ops()) or "nothing",
    }


def _tried(function: Callable[..., None], *args: Any) -> str:
    try:
        function(*args)
    except Exception as error:
        return _failed(error)
    return "yes"


def _failed(error: Exception) -> str:
    return f"NO: {type(error).__name__}: {error}".partition("\n")[0][:80]


def _opcheck(op: Op[...], device: torch.device) -> None:
    sample = op.make_samples(device)[0]
    arguments = dict(op.bind(sample.args, sample.kwargs))
    arguments |= {name: torch.empty(0, device=device) for name in op.mutates if arguments[name] is None}
    positional = [arguments.pop(p.name) for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    torch.library.opcheck(op.overload, tuple(positional), arguments)


def _same(subject: Subject, device: torch.device) -> None:
    """Outputs and what is mutated, bit for bit."""
    torch._dynamo.reset()
    calls = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), subject.calls)
    ran = []
    for fn in (subject.fn, torch.compile(subject.fn, backend="aot_eager", dynamic=True)):
        copied = copy.deepcopy(calls)
        ran.append(([fn(*args, **kwargs) for args, kwargs in copied], [args for args, _ in copied]))
    torch.testing.assert_close(*ran, rtol=0, atol=0)


def traced(*, device: str) -> list[Any]:
    """In a child process: the same subjects for a device that is not there."""
    return [[subject.name, check(subject, torch.device(device), here=False)] for subject in subjects("cpu")]


def main() -> int:
    """Print the table; 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m compile_tests", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or xpu; one that is not here is traced as absent")
    parser.add_argument(
        "--against-torch",
        metavar="TARGET",
        help="hold the audit of a target of `mamba-ops audit` to torch's own trace instead; all: of PyPI packages here",
    )
    parser.add_argument("--times", type=int, default=1, help="with --against-torch: how often the seconds are taken")
    parser.add_argument(
        "--models", action="store_true", help="print what each model of Transformers does instead, as docs/models.md"
    )
    arguments = parser.parse_args()
    if arguments.models:
        from compile_tests import models  # which needs Transformers

        sys.stdout.write(models.table())
        return 0
    if arguments.against_torch:
        return against_torch.main(arguments.against_torch, arguments.times)
    device = torch.device(arguments.device)
    here = device.type == "cpu" or torch.get_device_module(device).is_available()
    with torch.no_grad():
        if here:
            rows = [(subject.name, check(subject, device, here=True)) for subject in subjects(device)]
        else:
            rows = absent.run("compile_tests.__main__:traced", device=device.type)
    table = Table(title=f"On {device}{'' if here else ', which is not present'}", title_justify="left")
    for heading in ("op or layer", *CHECKS):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("op or layer", "splits at"))
    for name, found in rows:
        cells = [escape(found[check]) for check in CHECKS]
        table.add_row(name, *(f"[red]{cell}[/red]" if cell.startswith("NO") else cell for cell in cells))
    console = Console(highlight=False)
    console.width = max(console.width, 110)  # a log has no width
    console.print(table)
    return int(any(cell.startswith("NO") for _, found in rows for cell in found.values()))


if __name__ == "__main__":
    sys.exit(main())
