"""KDA on FlashInfer's kernels: through our ops, called directly, and our Triton kernels beside them, in one process.

Errors come first, relative to the float64 reference, then times. A GPU that the adapters refuse can be tried all the
same with `--anyway`: then the page says whether FlashInfer's kernels run there and are right.
"""

import argparse
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.measure import Row, number, ratio
from mamba_ops.backends import flashinfer as backend
from mamba_ops.commands.bench import peers
from mamba_ops.commands.bench.clocks import copy_bandwidth
from mamba_ops.commands.bench.run import AGREEMENT, RUNS, check
from mamba_ops.ops import bench
from mamba_ops.ops.chunk_kda import bench as chunk_kda
from mamba_ops.ops.kda_update import bench as kda_update

DECODE, PREFILL = (1, 8, 64, 256), ((4096,), (1024,) * 16)
OPS = ("kda_update", "chunk_kda")


def cases_of(op: str, device: torch.device) -> Iterator[bench.Case]:
    """Kimi-Linear's layer: decodes with bfloat16 states, as FlashInfer takes no others, and prefills with float32."""
    if op == "chunk_kda":
        for lengths in PREFILL:
            yield chunk_kda.case(lengths, device)
        return
    for rows in DECODE:
        case = kda_update.case(rows, device)
        states = {name: cache.bfloat16() for name, cache in case.caches.items()}
        yield replace(case, name=f"{case.name}, bfloat16 states", caches=states)


def contestants(case: bench.Case) -> dict[str, tuple[AbstractContextManager[object], Callable[[], peers.Calls]]]:
    """Who computes a case: within what, and what makes the call."""
    return {
        "triton": (mamba_ops.use_backend("triton"), lambda: peers.Calls(case.ours(), case.ours())),
        "flashinfer": (mamba_ops.use_backend("flashinfer"), lambda: peers.Calls(case.ours(), case.ours())),
        "direct": (nullcontext(), lambda: _calls(peers.of(case.op)["FlashInfer"](case))),
    }


def _calls(arranged: peers.Call | peers.Calls) -> peers.Calls:
    return arranged if isinstance(arranged, peers.Calls) else peers.Calls(arranged, arranged)


def measured(case: bench.Case, bandwidth: float) -> Iterator[Row]:
    """Yield a row for each contestant; times in microseconds. A failure is noted in it, and the others still run."""
    print(f"{case.op.name}: {case.name}", flush=True)
    expected, times = case.expected(), {}
    for name, (within, arrange) in contestants(case).items():
        row: Row = {"op": case.op.name, "case": case.name, "contestant": name, "floor": 1e6 * case.bytes / bandwidth}
        try:
            with within:
                calls = arrange()
                found = check(case, calls.checked, expected, RUNS)
                row["error"], row["steady"] = found.error, found.steady and found.kept
                caches = {key: cache.clone() for key, cache in case.caches.items()}
                call = partial(calls.timed, caches, case.tables[0])
                row["us"] = times[name] = measure.device_us(call, case.cache.device)
                row["eager"] = measure.bench_us(call)
        except Exception as error:
            traceback.print_exc()
            row["failed"] = str(error).splitlines()[0]
        row |= {f"{other}_us": us for other, us in times.items()}
        yield row


def _error(row: Row) -> str:
    if "failed" in row:
        return str(row["failed"])
    return f"{row['error']:.1e}" + ("" if row["steady"] else " UNSTEADY")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "kernels": lambda row: row["contestant"],
    "us": lambda row: number(row, "us"),
    "eager us": lambda row: number(row, "eager"),
    "floor us": lambda row: number(row, "floor"),
    "Triton/this": lambda row: ratio(row, "triton_us", "us"),
    "error": _error,
}


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--anyway", action="store_true", help="try a GPU that the adapters refuse, too")
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = measure.options("flashinfer_kda", str(__doc__), OPS)
    device: torch.device = options.device
    import flashinfer

    torch.manual_seed(0)
    facts: dict[str, Any] = {**measure.facts(options), "flashinfer": flashinfer.__version__}
    facts["command"] += " --anyway" * mine.anyway
    facts["capability"] = backend.capability(device)
    taken = mock.patch.object(backend, "capability", return_value=(10, 0)) if mine.anyway else nullcontext()
    with torch.inference_mode(), taken:
        bandwidth = copy_bandwidth(device)
        ops = [options.op] if options.op else OPS
        groups = {op: [row for case in cases_of(op, device) for row in measured(case, bandwidth)] for op in ops}
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "flashinfer"))
    notes = [
        "flashinfer: our op on that backend; direct: the vendor's function on inputs arranged before the clock starts",
        f"compute capability {'.'.join(map(str, facts['capability']))}; {versions}",
        measure.bandwidth_note(bandwidth),
    ]
    page = measure.page("FlashInfer: KDA", facts, {op: (COLUMNS, rows) for op, rows in groups.items()}, notes)
    rows = list(itertools.chain.from_iterable(groups.values()))
    measure.report(options, page, {**facts, "rows": rows})
    return int(any("failed" in row or not row["steady"] or row["error"] > AGREEMENT for row in rows))


if __name__ == "__main__":
    sys.exit(main())
