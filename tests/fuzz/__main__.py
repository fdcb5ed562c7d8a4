"""`python -m tests.fuzz --count 20000`: make many random calls, and print how they ended."""

import argparse
import collections
import os
import random
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")  # triton reads it once, at import

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.fuzz.calls import one_call
from tests.fuzz.outcomes import NO_TRUTH, REFUSED, RIGHT, Wrong


def main() -> int:
    """Return the exit status: 1 if a call ended as none may."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="number of calls (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; call i has seed + i")
    parser.add_argument("--backend", choices=("torch", "cpp", "triton"), default="torch", help="default: %(default)s")
    parser.add_argument("--show", type=int, default=20, help="how many wrong calls to print (default: %(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN: what nobody wrote shows
    console = Console(stderr=True, highlight=False, markup=False)
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong = 0
    for seed in track(range(given.seed, given.seed + given.count), "calls", console=console):
        try:
            name, end = one_call(random.Random(seed).randrange, given.backend)
        except Wrong as error:
            name, end = str(error).split(" ", 1)[0].split("(")[0], "other"
            wrong += 1
            if wrong <= given.show:
                console.print(f"--seed {seed} --count 1: {error}", soft_wrap=True)
        ends[name][end] += 1
    table = Table("called", RIGHT, REFUSED, NO_TRUTH, "other", title=f"{given.count} calls on {given.backend}")
    for name in sorted(ends):
        table.add_row(name, *(str(ends[name][end]) for end in (RIGHT, REFUSED, NO_TRUTH, "other")))
    total = sum(ends.values(), collections.Counter())
    table.add_section()
    table.add_row("all", *(str(total[end]) for end in (RIGHT, REFUSED, NO_TRUTH, "other")))
    Console(highlight=False).print(table)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
