"""Our Triton kernels for whole sequences beside the peers', in one process on one device: errors first, then times.

README.md says what each column means. On a CPU ours run alone, in Triton's interpreter on small sizes, and only
errors are shown.
"""

import itertools
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

import mamba_ops
from benchmarks import measure
from benchmarks.measure import Row, number, ratio
from benchmarks.peers import peers_of, versions
from mamba_ops.commands.bench import peers
from mamba_ops.commands.bench.clocks import copy_bandwidth
from mamba_ops.commands.bench.peers import Arrange
from mamba_ops.commands.bench.run import AGREEMENT, check
from mamba_ops.ops import bench
from mamba_ops.ops.causal_conv1d.bench import case as conv
from mamba_ops.ops.mamba_chunk_scan.bench import case as chunk_scan

TOKENS = 16384
VARIANT_TOKENS = (3, 5, 1, 2, 4, 8, 15, 16, 17, 64, 100, 255, 256, 257, 512, 1000, 1024, 3000, 4096, 10000)
RUNS = 5  # from the same inputs, which must give the same bits: a race would show
LIMITS = {  # ours may take so many times as long as any of these
    "mamba_chunk_scan": (1.2, ("vLLM", "mamba_ssm")),
    "causal_conv1d": (1.5, ("causal-conv1d", "causal-conv1d, packed")),
}

Contestants = dict[str, bench.Calls]
"""By name."""


# ---- cases -----------------------------------------------------------------------------------------------------------


OPS: dict[str, tuple[Callable[..., bench.Case], tuple[tuple[int, bool], ...]]] = {
    "mamba_chunk_scan": (chunk_scan, ((1, False), (16, False), (1, True), (16, True))),
    "causal_conv1d": (conv, ((16, False), (16, True))),
}


def cases_of(op: str, device: torch.device) -> Iterator[bench.Case]:
    """Yield cases one by one, as the expected result of one takes gigabytes."""
    build, sizes = OPS[op]
    for sequences, carried in sizes:
        yield build(64 if device.type == "cpu" else TOKENS, sequences, device, carried=carried)


# ---- measures --------------------------------------------------------------------------------------------------------


def contestants(case: bench.Case) -> Contestants:
    """Ours and, on a GPU, the peers that are there and can do this."""
    calls = {"ours": bench.Calls(case.ours(), case.ours())}
    if case.cache.device.type != "cpu":
        calls |= present(peers_of(case.op), case)
    return calls


def present(known: Mapping[str, Arrange], case: bench.Case) -> Contestants:
    """The calls of the peers that are installed and take a case; which are not is printed."""
    found, absent = peers.present(known, case)
    for name, why in absent.items():
        print(f"  no {name}: {why}", flush=True)
    return found


def measured(case: bench.Case, contestants: Callable[[bench.Case], Contestants], bandwidth: float | None) -> list[Row]:
    """A row for each contestant; times in microseconds. A failure is noted in it, so that the others still run."""
    print(f"{case.op.name}: {case.name}", flush=True)
    calls, expected = contestants(case), case.expected()
    rows: list[Row] = []
    for contestant, (checked, timed) in calls.items():
        row: Row = {"op": case.op.name, "case": case.name, "contestant": contestant}
        rows.append(row)
        try:
            found = check(case, checked, expected, RUNS)
            row["error"], row["steady"] = found.error, found.steady and found.kept
            if bandwidth is not None:
                caches = {name: cache.clone() for name, cache in case.caches.items()}
                row["us"] = measure.device_us(partial(timed, caches, case.tables[0]), case.cache.device)
                row |= {"bytes": case.bytes, "floor": 1e6 * case.bytes / bandwidth}
        except Exception as error:
            traceback.print_exc()
            row["failed"] = repr(error)
        if "us" in rows[0]:
            row["ours"] = rows[0]["us"]
    return rows


def variants(cases: Iterable[bench.Case]) -> list[int]:
    """How many kernel variants Triton has made of ours after each of an op's cases.

    Comes before anything else of that op in this process: what is compiled already would not be counted.
    """
    counts = []
    for case in cases:
        with measure.compilations() as compiled:
            case.ours()(case.caches, case.tables[0])
        counts.append(len(compiled))
    return list(itertools.accumulate(counts))


# ---- the report ------------------------------------------------------------------------------------------------------


def _error(row: Row) -> str:
    if "failed" in row:
        return "FAILED"
    remarks = [" WRONG"] * (not row["error"] <= AGREEMENT) + [" UNSTEADY"] * (not row["steady"])
    return f"{row['error']:.1e}{''.join(remarks)}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "kernels": lambda row: row["contestant"],
    "us": partial(number, key="us"),
    "ours/this": partial(ratio, key="ours", base="us"),
    "MB": partial(number, key="bytes", unit=1e6),
    "floor us": partial(number, key="floor"),
    "us/floor": partial(ratio, key="us", base="floor"),
    "error": _error,
}


def criteria(rows: list[Row]) -> list[tuple[str, float, float]]:
    """What must hold: a sentence, the largest ratio of all cases and the most that it may be."""
    found = []
    for op, (limit, others) in LIMITS.items():
        for contestant in others:
            timed = [
                row
                for row in rows
                if (row["op"], row["contestant"]) == (op, contestant) and "us" in row and "ours" in row
            ]
            if timed:
                found.append((f"{op}, ours / {contestant}", max(row["ours"] / row["us"] for row in timed), limit))
    return found


def main() -> int:
    options = measure.options("prefill", str(__doc__), OPS)
    device: torch.device = options.device
    timed = device.type != "cpu"
    ops = [options.op] if options.op else list(OPS)
    facts: dict[str, Any] = {**measure.facts(options), "peers": versions() if timed else {}, "variants": {}}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        for op in ops if timed else ():
            build = OPS[op][0]
            facts["variants"][op] = variants(build(n, min(n, 7), device, carried=True) for n in VARIANT_TOKENS)
        facts["copy_bandwidth"] = copy_bandwidth(device) if timed else None
        groups = [measured(case, contestants, facts["copy_bandwidth"]) for op in ops for case in cases_of(op, device)]
    rows = list(itertools.chain.from_iterable(groups))

    notes = [", ".join(f"{name} {facts[name]}" for name in ("torch", "triton"))]
    notes[0] += "".join(f"; {name} {version}" for name, version in facts["peers"].items())
    if timed:
        notes.append(measure.bandwidth_note(facts["copy_bandwidth"]))
    for op, after in facts["variants"].items():
        new = f"{after[1]} variants after the first two, +{after[-1] - after[1]} after all"
        notes.append(f"{op}, ours, {len(after)} token counts: {new}")
    for what, worst, limit in criteria(rows):
        notes.append(f"{what}: {worst:.2f} at worst, at most {limit}: {'pass' if worst <= limit else 'FAIL'}")
    tables = {op: (COLUMNS, list(group)) for op, group in itertools.groupby(rows, lambda row: row["op"])}
    measure.report(options, measure.page("Prefill", facts, tables, notes), {**facts, "rows": rows})
    right = all(row.get("steady") and row["error"] <= AGREEMENT for row in rows if row["contestant"] == "ours")
    return 0 if right and all(worst <= limit for _, worst, limit in criteria(rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
