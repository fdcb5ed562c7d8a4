"""How long torch.compile takes over a training step of Transformers' Mamba-2: stock beside ours, over five lengths.

The seconds are those of each length's first step less its second. Caches of compiled code are off.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from datetime import date

import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from benchmarks import measure
from benchmarks.loss_curves import SIZES, new_model
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.compat.transformers import use_mamba_ops

LENGTHS = (48, 33, 64, 80, 21)


def measured(layers: int, device: torch.device, backend: str, ours: bool) -> tuple[list[float], int, int]:
    """Return the seconds of compiling for every length, and how many graphs there were, forwards and both ways."""
    torch.compiler.reset()
    counters.clear()
    model, seconds = new_model(layers, device, torch.float32), []
    with use_mamba_ops(model) if ours else nullcontext():
        compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=backend)
        for length in LENGTHS:
            rows = torch.randint(SIZES["vocab_size"], (2, length), device=device)
            steps = []
            for _ in range(2):
                start = time.perf_counter()
                compiled(input_ids=rows, labels=rows).loss.backward()
                torch.get_device_module(device).synchronize()
                steps.append(time.perf_counter() - start)
            seconds.append(max(steps[0] - steps[1], 0.0))
    return seconds, counters["stats"]["unique_graphs"], counters["aot_autograd"]["ok"]


def main() -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    description = str(__doc__).partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_training", description=description)
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--only", choices=["ours", "stock"], help="this one alone; stock takes minutes")
    options = parser.parse_args()
    print(f"# Compile of a training step on {options.device}, {date.today().isoformat()}, torch {torch.__version__}\n")
    print(f"| | {' | '.join(f'{n} tokens, s' for n in LENGTHS)} | graphs | with a backward |\n{'|---' * 8}|")
    failed = False
    for name in ("ours", "stock"):
        if options.only not in (None, name):
            continue
        with quiet_transformers(), torch._inductor.config.patch(force_disable_caches=True):
            seconds, graphs, both = measured(options.layers, options.device, options.backend, name == "ours")
        print(f"| {name} | {' | '.join(f'{s:.1f}' for s in seconds)} | {graphs} | {both} |", flush=True)
        failed |= name == "ours" and (graphs, both) != (1, 1)
    print(f"\n- {options.layers} layers of width {SIZES['hidden_size']}; `{measure.command(parser, options)}`")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
