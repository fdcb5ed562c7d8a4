"""How long torch.compile takes over one layer of each kind: Transformers' own beside the same one on our ops.

Each is compiled in a process of its own, with a compile cache that has nothing but Inductor's headers. Seconds are the
processor's, for the process and the C++ compilers that it runs, so that other work on the machine counts little.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from benchmarks import measure
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.commands.watch import device_name
from mamba_ops.compat.transformers import use_mamba_ops
from tests.transformers_models import VOCABULARY, new_model

MIXERS = {
    "mamba": "MambaMixer",
    "mamba2": "Mamba2Mixer",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "kimi_linear": "KimiLinearDeltaAttention",
    "lfm2": "Lfm2ShortConv",
}
"""Family to the class of its mixers."""
SIDES, TASKS = ("stock", "ours"), ("forward", "forward and backward")
CPU = torch.device("cpu")


def used() -> float:
    """Seconds of the processor, of this process and of its children that have ended."""
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def mixer_of(model: Any, family: str, tokens: torch.Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The first mixer of a model, and what the model calls it with."""
    mixer = next(module for module in model.modules() if type(module).__name__ == MIXERS[family])
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = mixer.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    return mixer, *given[0]


def compiled(family: str, side: str, task: str, length: int) -> dict[str, float]:
    """Seconds of compiling, and how many graphs there are."""
    training = task != TASKS[0]
    torch.manual_seed(0)
    model = new_model(family, CPU)
    tokens = torch.randint(VOCABULARY, (2, length))
    mixer, args, kwargs = mixer_of(model, family, tokens)
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.requires_grad_(training)

    def run(call: Any, *args: Any, **kwargs: Any) -> None:
        with nullcontext() if training else torch.no_grad():
            out = call(*args, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            if training:
                out.sum().backward()

    run(torch.compile(lambda x: x.sin() * x), torch.ones(8, requires_grad=training))  # headers, once in a cache
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with use_mamba_ops(model) if side == "ours" else nullcontext():
        call = torch.compile(mixer)
        begin = used()
        run(call, *args, **kwargs)
        first = used()
        run(call, *args, **kwargs)
        again = used()
    return {"seconds": 2 * first - begin - again, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def in_child(family: str, side: str, task: str, options: argparse.Namespace) -> dict[str, float] | None:
    """Measure one in a process of its own; None if it takes longer than the limit, and no number if it fails."""
    command = [sys.executable, "-m", "benchmarks.compile_layers", "--length", str(options.length)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        folders = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_CPU, (options.cap, options.cap))

        ended = subprocess.run(
            [*command, "--one", family, side, task],
            env={**os.environ, **folders},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=limited,
            check=False,
        )
    if ended.returncode < 0:
        return None
    if ended.returncode:
        return {"seconds": math.nan}
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_layers", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--families", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--length", type=int, default=64, help="tokens of each of two rows (default: 64)")
    parser.add_argument("--cap", type=int, default=600, help="seconds of the processor after which one is stopped")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    measure.add_outputs(parser)
    options = parser.parse_args()
    if options.one:
        with quiet_transformers():
            print(json.dumps(compiled(*options.one, options.length)))
        return 0
    rows: list[measure.Row] = []
    for family in options.families:
        for task in TASKS:
            row: measure.Row = {"layer": MIXERS[family], "task": task, "cap": options.cap}
            rows.append(row)
            for side in SIDES:
                found = in_child(family, side, task, options)
                row |= (
                    {side: None}
                    if found is None
                    else {side: found["seconds"], f"{side} graphs": found.get("graphs", "-")}
                )
            print(row, file=sys.stderr, flush=True)
    facts = {
        "date": date.today().isoformat(),
        "device": device_name(CPU),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "command": measure.command(parser, options),
    }
    notes = [
        "seconds of the processor, one thread and one compiler at a time; Inductor's headers are compiled before",
        "other work on the machine makes them longer, so it is the ratio that counts",
        f"float32, two rows of {options.length} tokens, no cache; torch.compile(mixer)",
        f"torch {facts['torch']}, transformers {facts['transformers']}",
    ]
    text = measure.page("Compiling one layer", facts, {"One layer": (COLUMNS, rows)}, notes)
    options.name = "compile_layers"
    measure.report(options, text, {**facts, "rows": rows})
    return 0


def _seconds(row: measure.Row, side: str) -> str:
    if row[side] is None:
        return f"more than {row['cap']}"
    return "fails" if math.isnan(row[side]) else f"{row[side]:.1f}"


def _times(row: measure.Row) -> str:
    stock = row["cap"] if row["stock"] is None else row["stock"]
    if row["ours"] is None or math.isnan(stock + row["ours"]):
        return "-"
    return f"{'more than ' * (row['stock'] is None)}{stock / row['ours']:.1f}"


COLUMNS = {
    "layer": lambda row: row["layer"],
    "compiled": lambda row: row["task"],
    "stock, s": lambda row: _seconds(row, "stock"),
    "ours, s": lambda row: _seconds(row, "ours"),
    "stock/ours": _times,
    "graphs of stock": lambda row: str(row.get("stock graphs", "-")),
    "graphs of ours": lambda row: str(row.get("ours graphs", "-")),
}


if __name__ == "__main__":
    sys.exit(main())
