"""What our front adds to a bare torch.library op: a ladder from a plain Python function to torch.library.custom_op.

No rung runs a kernel, so that only the call is timed: all rungs side by side, in one process.
"""

import argparse
import inspect
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.idle_ops import bare_op, does_nothing, idle_backend, us_per_call
from benchmarks.measure import command
from mamba_ops import selective_state_update
from mamba_ops.commands.watch import device_name
from mamba_ops.registry import Namespace, Op, require_out


def sixteen_arguments(
    ssm_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    null_slot: int = -1,
    philox_rounds: int = 0,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Do nothing, with the arguments of a decode op."""
    return require_out(out)


def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@contextmanager
def declared() -> Iterator[Op[...]]:
    """Within the block, there is an op of sixteen arguments, in a namespace of its own."""
    namespace = Namespace("mamba_ops_boundary")
    try:
        op = namespace.op(mutates=("ssm_state", "out"))(sixteen_arguments)
        op.allocate_output(_output)
        yield op
    finally:
        namespace.remove()


PLAIN = "a Python function"
BARE = "a bare op"
FRONT = "our front, output given"
ALLOCATING = "our front, output allocated"
OVERLOAD = "our op's overload"
CUSTOM = "torch.library.custom_op"
REAL_BARE = "a bare op, selective_state_update's schema"
REAL_FRONT = "selective_state_update, output given"
BASE_OF = dict.fromkeys((PLAIN, BARE, FRONT, ALLOCATING, OVERLOAD, CUSTOM), BARE) | {
    REAL_BARE: REAL_BARE,
    REAL_FRONT: REAL_BARE,
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "inference": torch.inference_mode,
}

Times = dict[str, dict[str, float]]  # mode, rung: us a call


def measure(device: torch.device, **repeats: int) -> Times:
    """Time every rung in every mode; `repeats` are those of `us_per_call`."""
    args, kwargs, out = _arguments(device)
    sample = selective_state_update.make_samples(device)[0]
    real_out = torch.empty_like(sample.args[1])
    real, nothing = selective_state_update, torch.empty(0, device=device)  # for caches that are left out
    left_out = dict.fromkeys(real._left_out, nothing)
    with declared() as ours, idle_backend(ours, real), bare_op(ours) as bare, bare_op(real) as real_bare:
        calls: dict[str, Callable[[], object]] = {
            PLAIN: partial(does_nothing(ours.parameters), *args, **kwargs, output=out),
            BARE: partial(bare, *args, **kwargs, output=out),
            FRONT: partial(ours, *args, **kwargs, out=out),
            ALLOCATING: partial(ours, *args, **kwargs),
            OVERLOAD: partial(ours.overload, *args, **kwargs, output=out),
            CUSTOM: partial(custom_op(ours), *args, **kwargs, output=out),
            REAL_BARE: partial(real_bare, *sample.args, **left_out, **sample.kwargs, output=real_out),
            REAL_FRONT: partial(real, *sample.args, **sample.kwargs, out=real_out),
        }
        times: Times = {}
        for mode, entered in MODES.items():
            with entered():
                times[mode] = us_per_call(calls, **repeats)
    return times


def _arguments(device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any], Tensor]:
    """A decode call with every optional argument given, each a tensor of its own as in real calls."""
    n, heads, dim, dstate = 4, 2, 4, 8
    new = partial(torch.randn, device=device)
    args = (new(n, heads, dim, dstate), new(n, heads, dim), new(n, heads), new(heads), new(n, 1, dstate))
    kwargs = {
        "D": new(heads),
        "z": new(n, heads, dim),
        "dt_bias": new(heads),
        "dt_softplus": True,
        "slots": torch.arange(n, device=device),
        "write_slots": torch.arange(n, device=device),
        "scale": 2.0,
    }
    return (*args, new(n, 1, dstate)), kwargs, new(n, heads, dim)


def custom_op(op: Op[...]) -> Callable[..., None]:
    """Declare the same op with torch.library.custom_op: all positional, as it takes no keyword-only tensors."""
    positional = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in op.parameters]
    positional.sort(key=lambda p: p.default is not p.empty)
    function = does_nothing(positional)
    function.__signature__ = inspect.Signature(positional, return_annotation=None)  # type: ignore[attr-defined]
    return torch.library.custom_op(f"mamba_ops_custom::{op.name}", function, mutates_args=op.mutates)


def criteria(times: Times) -> list[tuple[str, float, float]]:
    """What must hold in grad mode: a sentence, the ratio and the most that it may be."""
    grad = times["grad"]
    return [
        (f"{FRONT} / {BARE}", grad[FRONT] / grad[BARE], 1.5),
        (f"{FRONT} / {CUSTOM}", grad[FRONT] / grad[CUSTOM], 0.5),
    ]


def page(facts: dict[str, str], times: Times) -> str:
    """What is printed and what is saved: one markdown page."""
    text = io.StringIO()
    console = Console(file=text, width=120, markup=False, highlight=False)  # the same in a log as in a terminal
    console.print(f"# The boundary on {facts['device']}, {facts['date']}")
    table = Table(box=MARKDOWN)
    table.add_column("nothing runs behind it")
    for mode in times:
        table.add_column(f"{mode} mode, us", justify="right")
        table.add_column("to bare", justify="right")
    for rung, base in BASE_OF.items():
        cells = [(f"{us[rung]:.2f}", f"{us[rung] / us[base]:.2f}") for us in times.values()]
        table.add_row(rung, *(text for pair in cells for text in pair))
    console.print(table)
    for what, ratio, limit in criteria(times):
        console.print(f"- {what}: {ratio:.2f}, at most {limit}: {'pass' if ratio <= limit else 'FAIL'}")
    console.print(f"- torch {facts['torch']}, Python {facts['python']}; `{facts['command']}`")
    return re.sub(r" +\n", "\n", text.getvalue())


def main(arguments: list[str] | None = None) -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.boundary", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=default, help=f"where tensors are; default: {default}")
    parser.add_argument("--rounds", type=int, default=300, help="how often each rung has its turn")
    parser.add_argument("--number", type=int, default=100, help="calls in one turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args(arguments)
    facts = {
        "date": date.today().isoformat(),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "python": sys.version.partition(" ")[0],
        "command": command(parser, options),
    }
    times = measure(options.device, rounds=options.rounds, number=options.number)
    text = page(facts, times)
    if options.json:
        options.json.write_text(json.dumps({**facts, "us": times, "criteria": criteria(times)}, indent=1) + "\n")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"])
        (options.save / f"{facts['date']}_{name}_boundary.md").write_text(text)
    print(text)
    return 0 if all(ratio <= limit for _, ratio, limit in criteria(times)) else 1


if __name__ == "__main__":
    sys.exit(main())
