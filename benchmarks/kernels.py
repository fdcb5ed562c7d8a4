"""Our Triton kernels beside the peer's, in one process on one device: agreement first, then times.

README.md says what each column means. On a CPU both run in Triton's interpreter on small sizes, and only agreement is
shown.
"""

import functools
import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.measure import Row, number, ratio
from benchmarks.peers import peers_of, versions
from mamba_ops.commands.bench.clocks import copy_bandwidth
from mamba_ops.commands.bench.run import AGREEMENT
from mamba_ops.ops import bench
from mamba_ops.ops.causal_conv1d_update.bench import case as conv_update
from mamba_ops.ops.selective_state_update.bench import case as state_update

VARIANT_ROWS = (3, 5, 1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 160, 192, 200, 256)
PEER = "vLLM"

Calls = Mapping[str, bench.Call]
"""`ours` and, where it is installed, `peer`."""

# ---- cases -----------------------------------------------------------------------------------------------------------


BATCHES = (1, 8, 64, 256)
OPS: dict[str, list[tuple[Callable[[int, torch.device], bench.Case], tuple[int, ...]]]] = {
    "selective_state_update": [
        (partial(state_update, 2, torch.bfloat16), BATCHES),
        (partial(state_update, 2, torch.float32), BATCHES),
        (partial(state_update, 1, torch.bfloat16), (64,)),
    ],
    "causal_conv1d_update": [(conv_update, BATCHES)],
}


def cases_of(op: str, device: torch.device) -> Iterator[bench.Case]:
    """Yield cases one by one: the largest takes gigabytes. On a CPU, in the interpreter, only small batches."""
    for build, batches in OPS[op]:
        for rows in batches[:2] if device.type == "cpu" else batches:
            yield build(rows, device)


def calls_of(case: bench.Case) -> Calls:
    """The calls of a case."""
    calls = {"ours": case.ours()}
    if peer():
        arranged = peers_of(case.op)[PEER](case)
        assert callable(arranged)
        calls["peer"] = arranged
    return calls


@functools.cache
def peer() -> str | None:
    """The peer and its version, or None where it is not installed."""
    version = versions()[PEER]
    return None if version.startswith("absent") else f"{PEER} {version}"


# ---- measures --------------------------------------------------------------------------------------------------------


def compare(case: bench.Case) -> tuple[float | None, bool]:
    """The largest difference from the peer over output and state, and whether the two compute the same thing.

    Slots that the call does not name must keep their bits with both kernels.
    """
    slots, results = case.tables[0].long(), []
    for call in calls_of(case).values():
        case.out.fill_(math.nan)
        state = case.cache.clone()
        out = call(dict.fromkeys(case.caches, state), case.tables[0])
        results.append((out.float(), state[slots].float()))
        if not torch.equal(state.index_copy_(0, slots, case.cache[slots]), case.cache):
            return None, False
    if len(results) == 1:
        return None, True
    pairs = list(zip(*results, strict=True))
    difference = max(float((ours - peers).abs().max()) for ours, peers in pairs)
    return difference, all(float((ours - peers).norm()) <= AGREEMENT * float(peers.norm()) for ours, peers in pairs)


def kernel_us(case: bench.Case, call: bench.Call) -> float:
    """Time of one call on the device alone: all tables' calls in one CUDA graph, replayed."""

    def calls() -> None:
        for table in case.tables:
            call(case.caches, table)

    return measure.device_us(calls, case.cache.device) / len(case.tables)


def eager_us(case: bench.Case, call: bench.Call) -> float:
    """Time of one eager call as the device sees it, waiting for the host included."""
    return measure.bench_us(lambda: call(case.caches, case.tables[0]))


def host_us(case: bench.Case, call: bench.Call, calls: int = 200) -> float:
    """Time that the host spends on one eager call. Fewer calls than the device's queue holds, so none waits for it."""
    device = torch.get_device_module(case.cache.device)
    times = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(case.caches, case.tables[0])
        times.append((time.perf_counter() - start) / calls)
        device.synchronize()
    return 1e6 * statistics.median(times)


def measured(case: bench.Case, bandwidth: float | None) -> Row:
    """One row of the table; times in microseconds. A failure is noted in it, so that the other rows are still made."""
    print(f"{case.op.name}: {case.name}", flush=True)
    row: Row = {"op": case.op.name, "case": case.name, "bytes": case.bytes}
    try:
        row["max_difference"], row["agrees"] = compare(case)
        if bandwidth is not None:
            row["floor"] = 1e6 * case.bytes / bandwidth
            for contestant, call in calls_of(case).items():
                row[contestant] = kernel_us(case, call)
                row[f"{contestant}_eager"] = eager_us(case, call)
                row[f"{contestant}_host"] = host_us(case, call)
    except Exception as error:
        traceback.print_exc()
        row["error"] = repr(error)
    return row


def variants(op: str, device: torch.device) -> dict[str, list[int]]:
    """How many kernel variants Triton has made after each of VARIANT_ROWS batch sizes, ours and the peer's.

    Comes before anything else of that op in this process: what is compiled already would not be counted.
    """
    build, _ = OPS[op][0]
    counts: dict[str, list[int]] = {}
    for rows in VARIANT_ROWS:
        case = build(rows, device)
        for contestant, call in calls_of(case).items():
            with measure.compilations() as compiled:
                call(case.caches, case.tables[0])
            counts.setdefault(contestant, []).append(len(compiled))
    return {contestant: list(itertools.accumulate(new)) for contestant, new in counts.items()}


# ---- the report ------------------------------------------------------------------------------------------------------


def _agreement(row: Row) -> str:
    if "error" in row:
        return "FAILED"
    difference = "-" if row["max_difference"] is None else f"{row['max_difference']:.2g}"
    return difference if row["agrees"] else f"{difference} DIFFERS"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "ours us": lambda row: number(row, "ours"),
    "peer us": lambda row: number(row, "peer"),
    "ours/peer": lambda row: ratio(row, "ours", "peer"),
    "MB": lambda row: number(row, "bytes", 1e6, 2),
    "floor us": lambda row: number(row, "floor"),
    "ours/floor": lambda row: ratio(row, "ours", "floor"),
    "eager ours": lambda row: number(row, "ours_eager"),
    "eager peer": lambda row: number(row, "peer_eager"),
    "host ours": lambda row: number(row, "ours_host"),
    "host peer": lambda row: number(row, "peer_host"),
    "max diff": _agreement,
}


def page(facts: dict[str, Any], rows: list[Row]) -> str:
    """What is printed and what is saved: one markdown page."""
    notes = [f"torch {facts['torch']}, triton {facts['triton']}; the peer is {facts['peer'] or 'absent'}"]
    if facts["copy_bandwidth"]:
        notes.append(measure.bandwidth_note(facts["copy_bandwidth"]))
    for op, counts in facts["variants"].items():
        new = ", ".join(f"{contestant} +{after[-1] - after[1]}" for contestant, after in counts.items())
        notes.append(f"{op}, {len(VARIANT_ROWS)} batch sizes: variants after first two sizes: {new}")
    tables = {op: (COLUMNS, list(group)) for op, group in itertools.groupby(rows, lambda row: row["op"])}
    return measure.page("Kernels", facts, tables, notes)


def main() -> int:
    options = measure.options("kernels", str(__doc__), OPS)
    device: torch.device = options.device
    timed = device.type != "cpu"
    print(f"The peer: {peer() or versions()[PEER]}", flush=True)
    ops = [options.op] if options.op else list(OPS)
    facts: dict[str, Any] = {**measure.facts(options), "peer": peer()}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        facts["variants"] = {}
        for op in ops if timed else ():
            try:
                facts["variants"][op] = variants(op, device)
            except Exception:  # the rows will show it too
                traceback.print_exc()
        facts["copy_bandwidth"] = copy_bandwidth(device) if timed else None
        rows = [measured(case, facts["copy_bandwidth"]) for op in ops for case in cases_of(op, device)]
    measure.report(options, page(facts, rows), {**facts, "rows": rows})
    return 0 if all(row.get("agrees") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
