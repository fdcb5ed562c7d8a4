"""Our Triton kernels beside the peer's, in one process on one device: agreement first, then times.

README.md says what each column means. On a CPU both run in Triton's interpreter on small sizes, and only agreement is
shown.
"""

import argparse
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mamba_ops
from benchmarks.peers import Call, Peer, find_peer

COLD_BYTES = 256 << 20  # distinct state touched before any is touched again: more than the L2 cache of any GPU we know
VARIANT_ROWS = (3, 5, 1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128, 160, 192, 200, 256)
AGREEMENT = 1e-2  # relative error above which two kernels do not compute the same thing; bf16 products alone make 3e-3


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
    random = partial(_random, device=device)
    x, dt = random(rows, *x_shape), random(rows, *dt_shape)
    A, B, C = -1 - 15 * torch.rand(A_shape, device=device), random(rows, *B_shape), random(rows, *B_shape)
    weights = {"D": random(*dt_shape), "dt_bias": random(*dt_shape) - 3}
    options: dict[str, Any] = weights | ({"z": random(rows, *x_shape)} if version == 1 else {}) | {"dt_softplus": True}
    state_shape = (*x_shape, dstate)
    slots, tables = _slot_tables(rows, math.prod(state_shape) * state_dtype.itemsize, device)
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
        _nbytes(*inputs, tables[0], out) + 2 * rows * _nbytes(state[0]),
        {"ours": ours} | ({"peer": peer.selective_state_update(x, dt, A, B, C, **options)} if peer else {}),
    )


def conv(rows: int, device: torch.device, peer: Peer | None) -> Case:
    """The convolution of the same layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, width = (48, 4) if device.type == "cpu" else (10240, 4)
    x = _random(rows, dim, device=device)
    weight, bias = _random(dim, width, device=device), _random(dim, device=device)
    slots, tables = _slot_tables(rows, dim * (width - 1) * x.element_size(), device)
    state = _random(slots, width - 1, dim, device=device).transpose(1, 2)
    out = torch.empty_like(x)

    def ours(state: Tensor, slots: Tensor, out: Tensor) -> object:
        return mamba_ops.causal_conv1d_update(x, state, weight, bias, slots=slots, out=out)

    return Case(
        "causal_conv1d_update",
        f"batch {rows}, {dim} channels, width {width}",
        state,
        tables,
        out,
        _nbytes(x, weight, bias, tables[0], out) + 2 * rows * _nbytes(state[0]),
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
    """Built one by one: the largest holds gigabytes. On a CPU, where the kernels are interpreted, the small batches."""
    for build, batches in OPS[op]:
        for rows in batches[:2] if device.type == "cpu" else batches:
            yield build(rows, device, peer)


def _slot_tables(rows: int, row_bytes: int, device: torch.device) -> tuple[int, list[Tensor]]:
    """The slots that a cache needs, and random tables into it, each in memory of its own as an engine's is.

    A round through all of them touches COLD_BYTES, so that no call finds its state in the L2 cache. Slot 0 is in none.
    """
    count = 2 if device.type == "cpu" else min(max(2, -(-COLD_BYTES // (rows * row_bytes))), 2048)
    permutation = 1 + torch.randperm(count * rows, device=device).to(torch.int32)
    return 1 + count * rows, [table.clone() for table in permutation.view(count, rows)]


def _random(*shape: int, device: torch.device) -> Tensor:
    """In bfloat16, which Triton's interpreter cannot multiply: in float32 on a CPU."""
    return torch.randn(shape, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- measures --------------------------------------------------------------------------------------------------------


def compare(case: Case) -> tuple[float | None, bool]:
    """The largest difference from the peer over output and state, and whether the two compute the same thing.

    Slots that the call does not name must keep their bits, whoever ran.
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
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    return difference, all(float((ours - theirs).norm()) <= AGREEMENT * float(theirs.norm()) for ours, theirs in pairs)


def kernel_us(case: Case, call: Call) -> float:
    """Time of one call on the device alone: all tables' calls in one CUDA graph, replayed."""

    def calls() -> None:
        for table in case.tables:
            call(case.state, table, case.out)

    device = torch.get_device_module(case.state.device)
    calls()
    device.synchronize()
    replay: Callable[[], None] = calls
    if hasattr(device, "CUDAGraph"):
        graph = device.CUDAGraph()
        with device.graph(graph):
            calls()
        replay = graph.replay
    return _do_bench_us(replay) / len(case.tables)


def eager_us(case: Case, call: Call) -> float:
    """Time of one eager call as the device sees it, waiting for the host included."""
    return _do_bench_us(lambda: call(case.state, case.tables[0], case.out))


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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * _nbytes(source) / (1e-6 * _do_bench_us(lambda: target.copy_(source)))


def _do_bench_us(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return 1e3 * float(do_bench(call, return_mode="median"))


def measure(case: Case, bandwidth: float | None) -> dict[str, Any]:
    """One row of the table; times in microseconds. A failure is noted in it, so that the other rows are still made."""
    print(f"{case.op}: {case.name}", flush=True)
    row: dict[str, Any] = {"op": case.op, "case": case.name, "bytes": case.bytes}
    try:
        row["max_difference"], row["agrees"] = compare(case)
        if bandwidth is not None:
            row["floor"] = 1e6 * case.bytes / bandwidth
            for who, call in case.calls.items():
                row[who] = kernel_us(case, call)
                row[f"{who}_eager"] = eager_us(case, call)
                row[f"{who}_host"] = host_us(case, call)
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
        for who, call in case.calls.items():
            with _compilations() as compiled:
                call(case.state, case.tables[0], case.out)
            counts.setdefault(who, []).append(len(compiled))
    return {who: list(itertools.accumulate(new)) for who, new in counts.items()}


@contextmanager
def _compilations() -> Iterator[list[str]]:
    """Collects what Triton compiles, or loads from its cache on disk, meanwhile."""
    from triton import knobs

    compiled: list[str] = []

    def note(*_: object, repr: str, **__: object) -> None:
        compiled.append(repr)

    with knobs.runtime.scope():
        knobs.runtime.jit_post_compile_hook = note
        yield compiled


# ---- the report ------------------------------------------------------------------------------------------------------


def _number(row: dict[str, Any], key: str, unit: float = 1, digits: int = 1) -> str:
    return f"{row[key] / unit:.{digits}f}" if key in row else "-"


def _ratio(row: dict[str, Any], base: str) -> str:
    return f"{row['ours'] / row[base]:.2f}" if base in row and "ours" in row else "-"


def _agreement(row: dict[str, Any]) -> str:
    if "error" in row:
        return "FAILED"
    difference = "-" if row["max_difference"] is None else f"{row['max_difference']:.2g}"
    return difference if row["agrees"] else f"{difference} DIFFERS"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "case": lambda row: row["case"],
    "ours us": lambda row: _number(row, "ours"),
    "peer us": lambda row: _number(row, "peer"),
    "ours/peer": lambda row: _ratio(row, "peer"),
    "MB": lambda row: _number(row, "bytes", 1e6, 2),
    "floor us": lambda row: _number(row, "floor"),
    "ours/floor": lambda row: _ratio(row, "floor"),
    "eager ours": lambda row: _number(row, "ours_eager"),
    "eager peer": lambda row: _number(row, "peer_eager"),
    "host ours": lambda row: _number(row, "ours_host"),
    "host peer": lambda row: _number(row, "peer_host"),
    "max diff": _agreement,
}


def page(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What is printed and what is saved: one markdown page."""
    text = io.StringIO()
    console = Console(file=text, width=200, markup=False, highlight=False)  # the same in a log as in a terminal
    console.print(f"# Kernels on {facts['device']}, {facts['date']}")
    for op, group in itertools.groupby(rows, lambda row: row["op"]):
        table = Table(box=MARKDOWN)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "case" else "right", no_wrap=True)
        for row in group:
            table.add_row(*(cell(row) for cell in COLUMNS.values()))
        console.print(f"\n## {op}", table)
    console.print(f"- torch {facts['torch']}, triton {facts['triton']}; the peer is {facts['peer'] or 'absent'}")
    if facts["copy_bandwidth"]:
        console.print(
            f"- a copy of 1 GiB on the device moves {facts['copy_bandwidth'] / 1e12:.2f} TB/s, read and written"
        )
    for op, counts in facts["variants"].items():
        new = ", ".join(f"{who} +{after[-1] - after[1]}" for who, after in counts.items())
        console.print(f"- {op}, {len(VARIANT_ROWS)} batch sizes: variants after first two sizes: {new}")
    return re.sub(r" +\n", "\n", text.getvalue())


def main() -> int:
    default = torch.accelerator.current_accelerator() or torch.device("cpu")
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--op", choices=list(OPS), help="this op alone")
    parser.add_argument("--device", type=torch.device, default=default, help=f"default: {default}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args()
    device: torch.device = options.device
    timed = device.type != "cpu"
    if not timed:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: it decides as it decorates
    import triton

    peer, sentence = find_peer()
    print(sentence, flush=True)
    ops = [options.op] if options.op else list(OPS)
    facts: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.get_device_module(device).get_device_name(device) if timed else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "peer": peer and peer.name,
    }
    torch.manual_seed(0)
    with torch.inference_mode(), mamba_ops.use_backend("triton"):
        facts["variants"] = {}
        for op in ops if timed else ():
            try:
                facts["variants"][op] = variants(op, device, peer)
            except Exception:  # the rows will say so too
                traceback.print_exc()
        facts["copy_bandwidth"] = copy_bandwidth(device) if timed else None
        rows = [measure(case, facts["copy_bandwidth"]) for op in ops for case in cases(op, device, peer)]
    text = page(facts, rows)
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"])
        (options.save / f"{facts['date']}_{name}_kernels.md").write_text(text)
    print(text)
    return 0 if all(row.get("agrees") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
