"""How long torch.compile takes over Transformers' own Mamba-2: stock beside ours, over prompts of several lengths.

Each runs in a process of its own; both share a compile cache that is empty at first and that ours fills.
"""

import argparse
import io
import re
import sys
import tempfile
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console

from benchmarks.measure import command
from mamba_ops.commands.demo.prefill import Job, Prefill, measure_in_child
from mamba_ops.commands.demo.run import read_text
from mamba_ops.commands.demo.show import compile_ratio, prefill_table
from mamba_ops.commands.targets import TargetError
from mamba_ops.commands.watch import device_name

LENGTHS = (512, 513, 300, 1024, 64)  # chunks of 256 filled, begun, one and a bit, several, and less than one


def page(facts: dict[str, str], stock: Prefill, ours: Prefill) -> str:
    """What is printed and what is saved: one markdown page."""
    text = io.StringIO()
    console = Console(file=text, width=120, markup=False, highlight=False)
    console.print(f"# Compile time on {facts['device']}, {facts['date']}")
    table = prefill_table(stock, ours)
    table.box, table.title = MARKDOWN, None
    console.print(table)
    console.print(f"- Ours, {compile_ratio(stock, ours)}")
    console.print(f"- {facts['model']}; torch.compile(model, dynamic={facts['dynamic']})")
    console.print(f"- torch {facts['torch']}, transformers {facts['transformers']}; `{facts['command']}`")
    return re.sub(r" +\n", "\n", text.getvalue())


def main(arguments: list[str] | None = None) -> int:
    default = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time", description=str(__doc__).partition("\n")[0]
    )
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="of prompts, in tokens")
    parser.add_argument("--cap", type=float, metavar="SECONDS", help="stop stock then; the ratio is a lower bound")
    parser.add_argument("--automatic", action="store_true", help="dynamic=None, torch's default: static shapes first")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args(arguments)
    dynamic = None if options.automatic else True
    text = list(read_text())
    prompts = [(text * (length // len(text) + 1))[:length] for length in options.lengths]
    job = Job("mamba2", prompts, str(options.device), True, options.layers, options.width, dynamic)

    def progress(step: str) -> None:
        print(f"{step} ...", file=sys.stderr, flush=True)

    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            ours = measure_in_child(job, progress, cache=Path(cache))
            stock = measure_in_child(replace(job, ours=False), progress, cache=Path(cache), cap=options.cap)
    except TargetError as error:
        parser.error(str(error))
    facts = {
        "date": date.today().isoformat(),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "model": f"Mamba2ForCausalLM, {options.layers} layers of width {options.width}, float32",
        "dynamic": str(dynamic),
        "command": command(parser, options),
    }
    text_of_page = page(facts, stock, ours)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"])
        (options.save / f"{facts['date']}_{name}_compile_time.md").write_text(text_of_page)
    print(text_of_page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
