"""FlashInfer's decode step through our op, the same function called directly, and our Triton kernel: in one process.

`--compile` compiles what this benchmark and the tests need of FlashInfer, on all cores, and times nothing.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mamba_ops
from benchmarks import measure
from benchmarks.idle_ops import idle_backend
from benchmarks.measure import Row, number, ratio
from mamba_ops.commands.bench.clocks import copy_bandwidth
from mamba_ops.commands.bench.run import AGREEMENT
from mamba_ops.ops import bench
from mamba_ops.registry import Op, Sample, noticing_swaps
from tests.harness import SIZES, samples_for

STATES = {
    "bfloat16": (1, 8, 64),
    "bfloat16, no slots": (1, 64),
    "float32": (1, 64),
    "float16": (64,),
    "float16, stochastic": (64,),
}
"""dtype of the state, how it is rounded and found, to the batches to time."""
HEADS, DIM, DSTATE, GROUPS = 128, 64, 128, 8
Call = Callable[[Tensor | None], object]
"""Of a slot table; everything else is bound."""


class Case:
    """One decode step of a large Mamba-2 layer, bound to our op, and to FlashInfer as an engine's layer calls it."""

    tables: Sequence[Tensor | None]

    def __init__(self, rows: int, kind: str, device: torch.device) -> None:
        dtype = getattr(torch, kind.partition(",")[0])
        random = partial(torch.randn, device=device, dtype=torch.bfloat16)
        x, dt, B, C = random(rows, HEADS, DIM), random(rows, HEADS), *random(2, rows, GROUPS, DSTATE)
        A, D, dt_bias = -1 - 15 * torch.rand(HEADS, device=device), random(HEADS), random(HEADS) - 3
        self.rows, self.tables = rows, [None]
        count = rows
        if "no slots" not in kind:
            count, self.tables = bench.slot_tables(rows, HEADS * DIM * DSTATE * dtype.itemsize, device)
        self.state = torch.randn(count, HEADS, DIM, DSTATE, device=device, dtype=dtype)
        self.out = torch.empty_like(x)
        seed = torch.tensor([1234567], device=device) if "stochastic" in kind else None
        options: dict[str, Any] = {"dt_softplus": True}
        asked = mamba_ops.selective_state_update.kernels["flashinfer"].unsupported_layout
        assert asked is not None
        self.refusals = partial(asked, self.state, x, dt, A, B, C, output=self.out)

        def ours(slots: Tensor | None) -> object:
            given = {"D": D, "dt_bias": dt_bias, "slots": slots, "rounding_seed": seed, "out": self.out, **options}
            return mamba_ops.selective_state_update(self.state, x, dt, A, B, C, **given)

        def views() -> tuple[Tensor, ...]:
            tied = D.unsqueeze(1).expand(-1, DIM), dt_bias.unsqueeze(1).expand(-1, DIM)
            return dt.unsqueeze(2).expand(-1, -1, DIM), A[:, None, None].expand(-1, DIM, DSTATE), *tied

        def bare(slots: Tensor | None, views: tuple[Tensor, ...] = views()) -> object:
            from flashinfer.mamba import selective_state_update as kernel

            wide_dt, wide_A, wide_D, bias = views
            given = {"dt_bias": bias, "state_batch_indices": slots, "out": self.out, "rand_seed": seed, **options}
            return kernel(self.state, x, wide_dt, wide_A, B, C, wide_D, **given)

        def direct(slots: Tensor | None) -> object:
            if slots is None:
                return bare(None, views())
            cleaned = torch.threshold(slots, -1, -1)
            bare(cleaned, views())
            return self.out.masked_fill_((cleaned < 0)[:, None, None], 0)

        self.ours, self.bare, self.direct = ours, bare, direct

    def result(self, call: Call) -> Tensor:
        before, slots = self.state.clone(), self.tables[0]
        call(slots)
        states = self.state[: self.rows] if slots is None else self.state[slots.long()]
        result = torch.cat([self.out.float().flatten(), states.float().flatten()])
        self.state.copy_(before)
        return result

    def times(self, call: Call) -> dict[str, float]:
        """Of one call in microseconds: on the device alone, and as the device sees an eager one."""

        def calls() -> None:
            for table in self.tables:
                call(table)

        with noticing_swaps():  # the graph is freed before the next swap
            device = measure.device_us(calls, self.state.device) / len(self.tables)
        return {"device": device, "eager": measure.bench_us(partial(call, self.tables[0]))}


Contestant = tuple[Callable[[], AbstractContextManager[object]], Callable[[], object]]
"""In what it is called, and the call."""


def host_us(contestants: dict[str, Contestant], device: torch.device, calls: int = 200) -> dict[str, float]:
    """The host's time for one eager call, by turns; fewer calls than the device's queue holds, so none waits for it."""
    module, times = torch.get_device_module(device), defaultdict[str, list[float]](list)
    for _ in range(15):
        for contestant, (context, call) in contestants.items():
            with context():
                call()
                module.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                times[contestant].append((time.perf_counter() - start) / calls)
                module.synchronize()
    return {f"{contestant}_host": 1e6 * statistics.median(found) for contestant, found in times.items()}


def measured(rows: int, kind: str, device: torch.device) -> Row:
    """One row of the table, printed as it comes."""
    row: Row = {"case": f"{rows} rows, {kind} state"}
    case = Case(rows, kind, device)
    results = {}
    contestants = {
        "bare": ("flashinfer", case.bare),
        "direct": ("flashinfer", case.direct),
        "ours": ("flashinfer", case.ours),
        "triton": ("triton", case.ours),
    }
    for contestant, (backend, call) in contestants.items():
        with mamba_ops.use_backend(backend):
            results[contestant] = case.result(call)
    for contestant, (backend, call) in contestants.items():  # all results come first: timing advances the states
        with mamba_ops.use_backend(backend):
            row |= {f"{contestant}_{what}": us for what, us in case.times(call).items()}
    calls: dict[str, Contestant] = {
        contestant: (partial(mamba_ops.use_backend, backend), partial(call, case.tables[0]))
        for contestant, (backend, call) in contestants.items()
    }
    calls["idle"] = partial(idle_backend, mamba_ops.selective_state_update), partial(case.ours, case.tables[0])
    calls["refusals"] = nullcontext, case.refusals
    row |= host_us(calls, device)
    row["boundary"] = row["idle_host"] + row["refusals_host"]
    row["ours_rest"] = row["ours_host"] - row["direct_host"] - row["boundary"]
    row["same bits"] = all(torch.equal(results[contestant], results["ours"]) for contestant in ("bare", "direct"))
    difference = (results["triton"] - results["ours"]).norm() / results["ours"].norm()
    row["difference"], row["agrees"] = float(difference), row["same bits"] and float(difference) < AGREEMENT
    print(", ".join(f"{name}: {cell(row)}" for name, cell in (DEVICE | HOST).items()), flush=True)
    return row


def cell_of(key: str) -> Callable[[Row], str]:
    return lambda row: number(row, key)


DEVICE: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "bare": cell_of("bare_device"),
    "direct": cell_of("direct_device"),
    "ours": cell_of("ours_device"),
    "ours/direct": lambda row: ratio(row, "ours_device", "direct_device"),
    "Triton": cell_of("triton_device"),
    "eager direct": cell_of("direct_eager"),
    "eager ours": cell_of("ours_eager"),
    "eager Triton": cell_of("triton_eager"),
    "same bits": lambda row: "yes" if row["same bits"] else "NO",
    "Triton differs by": lambda row: f"{row['difference']:.1e}",
}
HOST: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "bare": cell_of("bare_host"),
    "direct": cell_of("direct_host"),
    "boundary": cell_of("boundary"),
    "ours": cell_of("ours_host"),
    "the rest": cell_of("ours_rest"),
    "Triton": cell_of("triton_host"),
}

NOTES = [
    "bare: flashinfer.mamba.selective_state_update alone, on views made before the clock starts; slots as they are",
    "direct: as a layer calls it for what our op promises: views made, slots below 0 made -1, padding rows zeroed",
    "ours: our op on flashinfer; boundary: our op with nothing behind it, and its refusals, asked in every call",
    "the rest: ours - direct - boundary",
]


# ---- compiling beforehand --------------------------------------------------------------------------------------------


class _Noted(Exception):
    """Stands for the call of a kernel that is to be compiled."""


@contextmanager
def noted() -> Iterator[list[tuple[Any, ...]]]:
    """Within the block, FlashInfer's decode step raises instead of compiling; yields what it would have compiled."""
    from flashinfer.mamba import selective_state_update

    vendor = sys.modules[selective_state_update.__module__]
    wanted: list[tuple[Any, ...]] = []
    was = vendor._get_module

    def note(*args: Any) -> None:
        wanted.append(args)
        raise _Noted

    vendor._get_module = note
    try:
        yield wanted
    finally:
        vendor._get_module = was


def samples(device: torch.device, all_dtypes: bool) -> Iterator[Sample]:
    """What the tests call; with `all_dtypes` also what tests/test_numerics.py does in every pair of dtypes."""
    op: Op[...] = mamba_ops.selective_state_update
    sizes = SIZES["flashinfer", op.name]
    yield from samples_for(op, "flashinfer", device)
    floats = (torch.float16, torch.bfloat16, torch.float32) if all_dtypes else ()
    for dtype in floats:
        for state_dtype in floats:
            yield op.make_samples(device, dtype=dtype, state_dtype=state_dtype, **sizes)[0]
    for dstate, rounds in ((64, 0), (64, 7), (128, 0)):
        for sample in op.make_samples(device, dtype=torch.float32, dim=64, dstate=dstate):
            if sample.name == "stochastic rounding":
                yield Sample(sample.name, sample.args, {**sample.kwargs, "philox_rounds": rounds})


def compile_all(device: torch.device, which: str) -> int:
    """Compile on all cores what the tests and this benchmark call."""
    from flashinfer.jit import build_jit_specs
    from flashinfer.jit.mamba import gen_selective_state_update_sm90_module as specified

    cases = [Case(1, kind, device) for kind in STATES]
    with noted() as wanted, mamba_ops.use_backend("flashinfer"):
        for sample in samples(device, which == "all"):
            with suppress(_Noted):
                mamba_ops.selective_state_update(*sample.args, **sample.kwargs)
        for case in cases:
            with suppress(_Noted):
                case.ours(case.tables[0])
    # The order of arguments differs between the two functions.
    modules = {(*m[:5], m[11], *m[5:10], m[12]) for m in wanted}
    start = time.perf_counter()
    build_jit_specs([specified(*module) for module in modules])
    print(f"compiled {len(modules)} modules in {time.perf_counter() - start:.0f} s")
    return 0


def page(facts: dict[str, Any], rows: list[Row]) -> str:
    notes = [*NOTES, f"torch {facts['torch']}, triton {facts['triton']}, flashinfer {facts['flashinfer']}"]
    if facts["copy_bandwidth"]:
        notes.append(measure.bandwidth_note(facts["copy_bandwidth"]))
    tables = {"on the device, microseconds": (DEVICE, rows), "on the host, microseconds": (HOST, rows)}
    return measure.page("FlashInfer: selective_state_update", facts, tables, notes)


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    help = "compile what is needed, on all cores, and stop; all: also for the tests of all pairs of dtypes"
    parser.add_argument("--compile", nargs="?", const="some", choices=("some", "all"), help=help)
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    options = measure.options("flashinfer", str(__doc__), ["selective_state_update"])
    device: torch.device = options.device
    import flashinfer

    torch.manual_seed(0)
    with torch.inference_mode():
        if mine.compile:
            return compile_all(device, mine.compile)
        facts: dict[str, Any] = {**measure.facts(options), "flashinfer": flashinfer.__version__}
        facts["copy_bandwidth"] = copy_bandwidth(device)
        rows = [measured(batch, kind, device) for kind, batches in STATES.items() for batch in batches]
    measure.report(options, page(facts, rows), {**facts, "rows": rows})
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
