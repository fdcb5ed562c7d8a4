"""How long torch.compile takes over a training step of Transformers' Mamba-2: stock beside ours, over five lengths.

The seconds are those of each length's first step less its second. Caches of compiled code are off. On a CPU the seconds
are the processor's, of one thread and one compiler at a time, so that other work on the machine counts little.

Stock is compiled for all lengths at once if a model of one layer can be. Else it has a graph for each length, of which
the first is measured.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from benchmarks import measure
from benchmarks.compile_layers import used
from benchmarks.loss_curves import SIZES, new_model
from benchmarks.measure import number
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.commands.watch import device_name
from mamba_ops.compat.transformers import use_mamba_ops

LENGTHS = (48, 33, 64, 80, 21)
COLUMNS: dict[str, Callable[[measure.Row], str]] = {
    "model": lambda row: row["model"],
    **{f"{n} tokens, s": partial(lambda row, n: number(row, n), n=str(n)) for n in LENGTHS},
    "graphs": lambda row: str(row["graphs"]),
    "with a backward": lambda row: str(row["both"]),
}


def measured(
    layers: int, device: torch.device, backend: str, *, ours: bool, lengths: Sequence[int] = LENGTHS
) -> measure.Row:
    """Return the seconds of compiling for every length, and how many graphs there were, forwards and both ways.

    One length alone is compiled as it is, several as a symbol.
    """
    torch.compiler.reset()
    counters.clear()
    model, row = new_model(layers, device, torch.float32), measure.Row()
    now = used if device.type == "cpu" else time.perf_counter
    with use_mamba_ops(model) if ours else nullcontext():
        compiled = torch.compile(model, dynamic=len(lengths) > 1, fullgraph=True, backend=backend)
        for length in lengths:
            rows = torch.randint(SIZES["vocab_size"], (2, length), device=device)
            steps = []
            for _ in range(2):
                start = now()
                compiled(input_ids=rows, labels=rows).loss.backward()
                torch.get_device_module(device).synchronize()
                steps.append(now() - start)
            row[str(length)] = max(steps[0] - steps[1], 0.0)
    return row | {"graphs": counters["stats"]["unique_graphs"], "both": counters["aot_autograd"]["ok"]}


def stock_of(layers: int, device: torch.device, backend: str) -> tuple[measure.Row, str]:
    """Measure stock; return also what it has to be said of it."""
    try:
        measured(1, device, backend, ours=False)
    except Exception as error:  # of any compiler
        why = f"stock of one layer cannot be compiled for all lengths at once: {str(error).splitlines()[0]}"
        return measured(layers, device, backend, ours=False, lengths=LENGTHS[:1]), why
    return measured(layers, device, backend, ours=False), "stock is compiled for all lengths at once"


def main() -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    description = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_training", description=description)
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--only", choices=["ours", "stock"], help="this one alone; stock takes minutes")
    measure.add_outputs(parser)
    options = parser.parse_args()
    rows: list[measure.Row] = []
    settings: dict[str, Any] = {"force_disable_caches": True}
    clock = "seconds"
    if options.device.type == "cpu":
        torch.set_num_threads(1)
        settings["compile_threads"] = 1
        clock = "seconds of the processor, one thread and one compiler at a time"
    facts = {
        "date": date.today().isoformat(),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "command": measure.command(parser, options),
    }
    notes = [
        f"{clock}: each length's first step less its second; caches of compiled code are off",
        f"float32, two rows, {options.layers} layers of width {SIZES['hidden_size']}; fullgraph",
        f"torch {facts['torch']}, transformers {facts['transformers']}",
    ]
    with quiet_transformers(), torch._inductor.config.patch(settings):
        if options.only != "stock":
            found = measured(options.layers, options.device, options.backend, ours=True)
            rows.append({"model": "ours"} | found)
            print(rows[-1], file=sys.stderr, flush=True)
        if options.only != "ours":
            found, why = stock_of(options.layers, options.device, options.backend)
            rows.append({"model": "stock"} | found)
            print(rows[-1], file=sys.stderr, flush=True)
            notes.append(why)
    text = measure.page("Compiling a training step", facts, {"Transformers' Mamba-2": (COLUMNS, rows)}, notes)
    options.name = "compile_training"
    measure.report(options, text, {**facts, "rows": rows})
    return int(any(row["model"] == "ours" and (row["graphs"], row["both"]) != (1, 1) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
