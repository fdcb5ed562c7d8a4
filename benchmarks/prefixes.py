"""What a shared prefix saves, and what keeping states inside a prompt costs: one layer of each kind that has a plan.

A request of `--prefix` tokens and `--new` more is read as a whole, then in several rounds, then from the state of its
prefix. Beside the last stand the tokens that are new as a prompt of their own, and one copy of a state.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mamba_ops.cold_start.choosing import microseconds
from mamba_ops.commands.watch import device_name
from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, Mamba3, ShortConv
from mamba_ops.serving import Plan, StatePool

ROUNDS = (1, 2, 4, 8)


def layers_of(hidden: int, head: int) -> dict[str, Any]:
    """Layers with heads of one size, of a model `hidden` wide."""
    heads = hidden // head
    return {
        "Mamba": Mamba(hidden, d_inner=2 * hidden, dstate=16),
        "Mamba2": Mamba2(hidden, heads=2 * heads, head_dim=head, dstate=head, groups=1),
        "Mamba3": Mamba3(hidden, heads=2 * heads, head_dim=head, dstate=head),
        "GatedDeltaNet": GatedDeltaNet(hidden, num_k_heads=heads, num_v_heads=heads, head_k_dim=head, head_v_dim=head),
        "KimiDeltaAttention": KimiDeltaAttention(hidden, num_heads=heads, head_dim=head),
        "ShortConv": ShortConv(hidden),
    }


def times_of(layer: Any, prefix: int, new: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Microseconds of each way of reading, in the order of the table's columns."""
    layer = layer.to(device, dtype).requires_grad_(False)
    pool, total = StatePool.of({"layer": layer}, 16), prefix + new
    text = torch.randn(total, layer.hidden_size, device=device, dtype=dtype)

    def of(plan: Plan, first: int) -> Callable[[], object]:
        return lambda: layer(text[first:], *pool.caches["layer"], plan=plan)

    def plan(computed: int, tokens: int, rounds: int = 1, **options: Any) -> Plan:
        return Plan.of([computed], [tokens], [0], rounds=rounds, max_requests=16, device=device, **options)

    calls = []
    for rounds in ROUNDS:
        keep = {total * i // rounds: i for i in range(1, rounds)}
        calls.append(of(plan(0, total, rounds, keep=[keep]), 0))
    calls.append(of(plan(prefix, new, sources=[1]), prefix))
    calls.append(of(plan(0, new), prefix))
    calls.append(lambda: pool.copy(1, 0))
    with torch.no_grad():
        return [microseconds(call, device) for call in calls]


def main() -> None:
    """Print the table."""
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    is_cpu = default.type == "cpu"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefixes", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--hidden", type=int, default=256 if is_cpu else 4096, help="default: %(default)s")
    parser.add_argument("--prefix", type=int, default=1024 if is_cpu else 8192, help="default: %(default)s")
    parser.add_argument("--new", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    given = parser.parse_args()
    dtype = torch.float32 if given.device.type == "cpu" else torch.bfloat16
    table = Table(box=MARKDOWN)
    rounds = [f"in {n} rounds" if n > 1 else "all of it" for n in ROUNDS]
    columns = ("layer", *rounds, "after a hit", "the new alone", "a copy", "hit / (new + copy)")
    for column in columns:
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    found = {}
    layers = layers_of(given.hidden, 64 if given.hidden < 1024 else 128)
    for name, layer in track(layers.items(), "layers", total=len(layers), transient=True):
        us = times_of(layer, given.prefix, given.new, given.device, dtype)
        found[name] = dict(zip(columns[1:-1], us, strict=True))
        table.add_row(name, *(f"{t:.0f}" for t in us), f"{us[-3] / (us[-2] + us[-1]):.2f}")
    console = Console(width=200, highlight=False, markup=False)
    console.print(
        f"Microseconds of a layer, {given.prefix} + {given.new} tokens, {dtype}, on {device_name(given.device)}"
    )
    console.print(table)
    if given.json:
        facts = {"prefix": given.prefix, "new": given.new, "dtype": str(dtype), "device": device_name(given.device)}
        given.json.write_text(json.dumps({**facts, "microseconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
