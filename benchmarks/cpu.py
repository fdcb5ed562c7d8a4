"""Models of Transformers on a CPU under use_mamba_ops beside stock: prefill, and decoding by `generate`.

Each case is one model, width, dtype and number of threads. All sides take turns in one process, so that a busy machine
slows them alike, and the fastest of their turns counts. `free` is ours with ops that compute nothing: ours less that is
the ops' own time, and stock over that is what no ops of ours could do better. Models have random weights.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from importlib.metadata import version
from typing import Any

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.drop_in import new_model
from mamba_ops.commands.targets import quiet_transformers
from mamba_ops.commands.watch import device_name
from mamba_ops.compat.transformers import use_mamba_ops
from mamba_ops.registry import Backend

CPU = torch.device("cpu")
MODELS = ("mamba", "mamba2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPS = ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update", "mamba_chunk_scan")
GOALS = {("mamba", "prefill"): 3.2, ("mamba2", "prefill"): 1.8, ("mamba", "decode"): 1.2, ("mamba2", "decode"): 1.2}
"""Model and what it does to how many times as fast as stock it should be."""
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of logits, relative to the largest one

Call = Callable[[], object]


@contextmanager
def free_ops() -> Iterator[str]:
    """Within the block there is a backend whose ops write zeros."""

    def zeros(call: Any) -> None:
        call.output.zero_()

    backend = Backend("free", devices=("cpu",), priority=-100)
    for name in OPS:
        backend.implements(getattr(mamba_ops, name))(zeros)
    try:
        yield backend.name
    finally:
        backend.remove()


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.busy else time.perf_counter


@contextmanager
def side(model: Any, name: str, backend: str | None) -> Iterator[None]:
    """Within the block, the model runs as a side does: stock, or on our ops, on a backend."""
    if name == "stock":
        yield
        return
    with use_mamba_ops(model), mamba_ops.use_backend(backend) if backend else nullcontext():
        yield


def fastest(
    model: Any, call: Call, sides: dict[str, str | None], turns: int, clock: Callable[[], float]
) -> tuple[measure.Row, dict[str, Any]]:
    """Seconds of each side's fastest turn, after one that does not count, and what that one returned."""
    found, returned = dict.fromkeys(sides, math.inf), {}
    for turn in range(turns + 1):
        for name, backend in sides.items():
            with side(model, name, backend):
                start = clock()
                result = call()
                took = clock() - start
            if turn:
                found[name] = min(found[name], took)
            else:
                returned[name] = result
    return found, returned


def measured(
    name: str, width: int, dtype: torch.dtype, threads: int, options: argparse.Namespace, sides: dict[str, str | None]
) -> list[measure.Row]:
    """Measure one case: a row for its prefill, one for its decoding."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = new_model(name, options.layers, width, CPU).to(dtype)
    tokens = torch.randint(1024, (1, options.length))
    new = options.decode
    more = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    tasks: dict[str, tuple[Call, int]] = {
        "prefill": (lambda: model(tokens, use_cache=False).logits, options.turns),
        "decode": (lambda: model.generate(tokens[:, :8], **more), 2 * options.turns),
    }
    rows = []
    for task, (call, turns) in tasks.items():
        row: measure.Row = {"model": name, "task": task, "width": width, "dtype": str(dtype).removeprefix("torch.")}
        times, returned = fastest(model, call, sides, turns, clock_of(options))
        row |= {"threads": threads, "goal": GOALS[name, task], **times}
        if task == "prefill":
            row["error"] = error(returned)
            if row["error"] > AGREEMENT[dtype]:
                raise SystemExit(f"benchmarks.cpu: {row}: ours and stock do not compute the same")
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def error(logits: dict[str, Any]) -> float:
    """How far ours are from stock's, the side that is furthest, relative to the largest."""
    expected = logits["stock"]
    ours = [given for name, given in logits.items() if name not in ("stock", "free")]
    return max(float((given - expected).abs().max() / expected.abs().max()) for given in ours)


def compiled(options: argparse.Namespace, sides: dict[str, str | None]) -> list[measure.Row]:
    """Measure the prefill of Mamba-2 compiled, in float32."""
    rows = []
    for width, threads in itertools.product(options.widths, options.threads):
        torch.set_num_threads(threads)
        torch.compiler.reset()
        model = new_model("mamba2", options.layers, width, CPU)
        tokens, fast = torch.randint(1024, (1, options.length)), torch.compile(model)
        row: measure.Row = {"model": "mamba2", "task": "compiled", "width": width, "dtype": "float32"}

        def read(fast: Any = fast, tokens: torch.Tensor = tokens) -> object:
            return fast(tokens, use_cache=False).logits

        times, _ = fastest(model, read, sides, options.turns, clock_of(options))
        rows.append(row | {"threads": threads, "goal": 1.4, **times})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def columns(backends: list[str]) -> dict[str, Callable[[measure.Row], str]]:
    """The table's columns."""

    def of(key: str) -> Callable[[measure.Row], str]:
        return lambda row: str(row[key])

    def ms(key: str) -> Callable[[measure.Row], str]:
        return lambda row: measure.number(row, key, 1e-3, 2)

    def faster(key: str) -> Callable[[measure.Row], str]:
        return lambda row: measure.ratio(row, "stock", key)

    def own(key: str) -> Callable[[measure.Row], str]:
        return lambda row: f"{1e3 * (row[key] - row['free']):.2f}"

    found = {key: of(key) for key in ("model", "task", "width", "dtype", "threads")} | {"stock ms": ms("stock")}
    for name in ("ours", *backends):
        title = "default" if name == "ours" else name
        found |= {f"{title} ms": ms(name), f"stock/{title}": faster(name), f"ops of {title}, ms": own(name)}
    return found | {"goal": of("goal"), "stock/free ops": faster("free")}


def main() -> int:
    """Measure, print the page, and say whether every goal is met by one of our sides."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--widths", nargs="+", type=int, default=(256, 1024))
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the prompt that is read")
    parser.add_argument("--decode", type=int, default=32, help="tokens that are generated after a prompt of 8")
    parser.add_argument("--turns", type=int, default=5, help="of prefill; decoding has twice as many")
    parser.add_argument("--backends", nargs="*", default=(), help="measured beside the default order")
    parser.add_argument("--busy", action="store_true", help="count processor time: for one thread, on a busy machine")
    parser.add_argument("--compile", action="store_true", help="Mamba-2 compiled, too")
    measure.add_outputs(parser)
    options = parser.parse_args()
    if options.busy and tuple(options.threads) != (1,):
        raise SystemExit("benchmarks.cpu: --busy counts the time of all threads, waiting ones too; add --threads 1")
    rows: list[measure.Row] = []
    with torch.no_grad(), quiet_transformers(), free_ops() as free:
        sides = {"stock": None, "ours": None, **{name: name for name in options.backends}, "free": free}
        cases = itertools.product(options.models, options.widths, options.dtypes, options.threads)
        for name, width, dtype, threads in cases:
            rows += measured(name, width, DTYPES[dtype], threads, options, sides)
        if options.compile:
            rows += compiled(options, sides)
    facts = {
        "command": measure.command(parser, options),
        "date": date.today().isoformat(),
        "device": device_name(CPU),
        "torch": torch.__version__,
    }
    notes = [
        f"one row of {options.length} tokens, and {options.decode} tokens by generate after 8; {options.layers} layers",
        f"the fastest of turns that all sides take in one process{', processor time' if options.busy else ''}",
        "ops: what ours takes above ops that write zeros",
        f"torch {torch.__version__}, Transformers {version('transformers')}",
    ]
    tables = {"Stock over ours": (columns(list(options.backends)), rows)}
    text = measure.page("Transformers' models", facts, tables, notes)
    options.name = "cpu"
    measure.report(options, text, {**facts, "rows": rows})
    ours = ("ours", *options.backends)
    return 0 if all(row["stock"] >= row["goal"] * min(row[name] for name in ours) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
