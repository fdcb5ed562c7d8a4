"""Our Triton kernels beside the peer's, in one process on one device: agreement first, then times.

README.md says what each column means. On a CPU both run in Triton's interpreter on small sizes, and only agreement is
shown.
"""

import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from benchmarks import measure
from benchmarks.measure import AGREEMENT, Row, nbytes, number, ratio
from benchmarks.peers import Call, Peer, find_peer

COLD_BYTES = 256 << 20  # distinct state touched before any is touched again: more than the L2 cache of any GPU we know
VARIANT_ROWS = (3, 5, 1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 160, 192, 200, 256)


@dataclass(frozen=True)
class Case:
    """One set of inputs, bound to both kernels."""

    op: str
    name: str
    state: Tensor  # (slots, ...)
    tables: list[Tensor]  # slot tables without a common slot
    out: Tensor
    bytes: int  # the fewest that one call can move: every input read once, every result written once
    calls: dict[str, Call]  # "ours" and, where there is one, "peer"


# ---- cases -----------------------------------------------------------------------------------------------------------


def mamba(version: int, state_dtype: torch.dtype, rows: int, device: torch.device, peer: Peer | None) -> Case:
    """One decode step of a large Mamba-2 layer (A, dt, D tied over a head's channels) or of a gated Mamba-1 layer."""
    small = device.type == "cpu"
    shapes: tuple[tuple[int, ...], ...]
    if version == 2:
        heads, dim, dstate, groups = (4, 16, 16, 2) if small else (128, 64, 128, 8)
        shapes = (heads, dim), (heads,), (heads,), (groups, dstate)
    else:
        dim, dstate = (32, 16) if small else (8192, 16)
        shapes = (dim,), (dim,), (dim, dstate), (dstate,)
    x_shape, dt_shape, A_shape, B_shape = shapes
    random = partial(measure.random, device=device)
    x, dt = random(rows, *x_shape), random(rows, *dt_shape)
    A, B, C = -1 - 15 * torch.rand(A_shape, device=device), random(rows, *B_shape), random(rows, *B_shape)
    weights = {"D": random(*dt_shape), "dt_bias": random(*dt_shape) - 3}
    options: dict[str, Any] = weights | ({"z": random(rows, *x_shape)} if version == 1 else {}) | {"dt_softplus": True}
    state_shape = (*x_shape, dstate)
    slots, tables = slot_tables(rows, math.prod(state_shape) * state_dtype.itemsize, device)
    state = torch.randn(slots, *state_shape, device=device, dtype=state_dtype)
    out = torch.empty_like(x)

    def ours(state: Tensor, slots: Tensor, out: Tensor) -> object:
        return mamba_ops.selective_state_update(state, x, dt, A, B, C, **options, slots=slots, out=out)

    inputs = [x, dt, A, B, C, *(value for value in options.values() if isinstance(value, Tensor))]
    return Case(
        "selective_state_update",
        f"Mamba-{version}, batch {rows}, {str(state_dtype).removeprefix('torch.')} state",
        state,
        tables,
        out,
        nbytes(*inputs, tables[0], out) + 2 * rows * nbytes(state[0]),
        {"ours": ours} | ({"peer": peer.selective_state_update(x, dt, A, B, C, **options)} if peer else {}),
    )


def conv(rows: int, device: torch.device, peer: Peer | None) -> Case:
    """The convolution of the same layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, width = (48, 4) if device.type == "cpu" else (10240, 4)
    x = measure.random(rows, dim, device=device)
    weight, bias = measure.random(dim, width, device=device), measure.random(dim, device=device)
    slots, tables = slot_tables(rows, dim * (width - 1) * x.element_size(), device)
    state = measure.random(slots, width - 1, dim, device=device).transpose(1, 2)
    out = torch.empty_like(x)

    def ours(state: Tensor, slots: Tensor, out: Tensor) -> object:
        return mamba_ops.causal_conv1d_update(x, state, weight, bias, slots=slots, out=out)

    return Case(
        "causal_conv1d_update",
        f"batch {rows}, {dim} channels, width {width}",
        state,
        tables,
        out,
        nbytes(x, weight, bias, tables[0], out) + 2 * rows * nbytes(state[0]),
        {"ours": ours} | ({"peer": peer.causal_conv1d_update(x, weight, bias)} if peer else {}),
    )


BATCHES = (1, 8, 64, 256)
OPS: dict[str, list[tuple[Callable[[int, torch.device, Peer | None], Case], tuple[int, ...]]]] = {
    "selective_state_update": [
        (partial(mamba, 2, torch.bfloat16), BATCHES),
        (partial(mamba, 2, torch.float32), BATCHES),
        (partial(mamba, 1, torch.bfloat16), (64,)),
    ],
    "causal_conv1d_update": [(conv, BATCHES)],
}


def cases(op: str, device: torch.device, peer: Peer | None) -> Iterator[Case]:
    """Yield cases one by one: the largest takes gigabytes. On a CPU, in the interpreter, only small batches."""
    for build, batches in OPS[op]:
        for rows in batches[:2] if device.type == "cpu" else batches:
            yield build(rows, device, peer)


def slot_tables(rows: int, row_bytes: int, device: torch.device) -> tuple[int, list[Tensor]]:
    """The slots that a cache needs, and random tables into it, each in memory of its own as an engine's is.

    A round through all of them touches COLD_BYTES, so that no call finds its state in the L2 cache. Slot 0 is in none.
    """
    count = 2 if device.type == "cpu" else min(max(2, -(-COLD_BYTES // (rows * row_bytes))), 2048)
    permutation = 1 + torch.randperm(count * rows, device=device).to(torch.int32)
    return 1 + count * rows, [table.clone() for table in permutation.view(count, rows)]


# ---- measures --------------------------------------------------------------------------------------------------------


def compare(case: Case) -> tuple[float | None, bool]:
    """The largest difference from the peer over output and state, and whether the two compute the same thing.

    Slots that the call does not name must keep their bits with both kernels.
    """
    slots, results = case.tables[0].long(), []
    for call in case.calls.values():
        out, state = torch.full_like(case.out, math.nan), case.state.clone()
        call(state, case.tables[0], out)
        results.append((out.float(), state[slots].float()))
        if not torch.equal(state.index_copy_(0, slots, case.state[slots]), case.state):
            return None, False
    if len(results) == 1:
        return None, True
    pairs = list(zip(*results, strict=True))
    difference = max(float((ours - peers).abs().max()) for ours, peers in pairs)
    return difference, all(float((ours - peers).norm()) <= AGREEMENT * float(peers.norm()) for ours, peers in pairs)


def kernel_us(case: Case, call: Call) -> float:
    """Time of one call on the device alone: all tables' calls in one CUDA graph, replayed."""

    def calls() -> None:
        for table in case.tables:
            call(case.state, table, case.out)

    return measure.device_us(calls, case.state.device) / len(case.tables)


def eager_us(case: Case, call: Call) -> float:
    """Time of one eager call as the device sees it, waiting for the host included."""
    return measure.bench_us(lambda: call(case.state, case.tables[0], case.out))


def host_us(case: Case, call: Call, calls: int = 200) -> float:
    """Time that the host spends on one eager call. Fewer calls than the device's queue holds, so none waits for it."""
    device = torch.get_device_module(case.state.device)
    times = []
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call(case.state, case.tables[0], case.out)
        times.append((time.perf_counter() - start) / calls)
        device.synchronize()
    return 1e6 * statistics.median(times)


def measured(case: Case, bandwidth: float | None) -> Row:
    """One row of the table; times in microseconds. A failure is noted in it, so that the other rows are still made."""
    print(f"{case.op}: {case.name}", flush=True)
    row: Row = {"op": case.op, "case": case.name, "bytes": case.bytes}
    try:
        row["max_difference"], row["agrees"] = compare(case)
        if bandwidth is not None:
            row["floor"] = 1e6 * case.bytes / bandwidth
            for contestant, call in case.calls.items():
                row[contestant] = kernel_us(case, call)
                row[f"{contestant}_eager"] = eager_us(case, call)
                row[f"{contestant}_host"] = host_us(case, call)
    except Exception as error:
        traceback.print_exc()
        row["error"] = repr(error)
    return row


def variants(op: str, device: torch.device, peer: Peer | None) -> dict[str, list[int]]:
    """How many kernel variants Triton has made after each of VARIANT_ROWS batch sizes, ours and the peer's.

    Comes before anything else of that op in this process: what is compiled already would not be counted.
    """
    build, _ = OPS[op][0]
    counts: dict[str, list[int]] = {}
    for rows in VARIANT_ROWS:
        case = build(rows, device, peer)
        for contestant, call in case.calls.items():
            with measure.compilations() as compiled:
                call(case.state, case.tables[0], case.out)
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
    peer, sentence = find_peer()
    print(sentence, flush=True)
    ops = [options.op] if options.op else list(OPS)
    facts: dict[str, Any] = {**measure.facts(options), "peer": peer and peer.name}
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        facts["variants"] = {}
        for op in ops if timed else ():
            try:
                facts["variants"][op] = variants(op, device, peer)
            except Exception:  # the rows will show it too
                traceback.print_exc()
        facts["copy_bandwidth"] = measure.copy_bandwidth(device) if timed else None
        rows = [measured(case, facts["copy_bandwidth"]) for op in ops for case in cases(op, device, peer)]
    measure.report(options, page(facts, rows), {**facts, "rows": rows})
    return 0 if all(row.get("agrees") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
