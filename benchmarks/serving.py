"""Decode of one request under the full graph, and requests that arrive: times to first tokens and between tokens.

For the former the model is that of examples/continuous_batching.py with the sizes of large hybrids, random weights, in
bfloat16: a step's time, and how much of it its kernels take themselves. The latter is in serving_requests.py.
"""

import time
from collections.abc import Callable

import torch
from rich.progress import Progress
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mamba_ops
from benchmarks.measure import Row, facts, number, options, page, report
from examples.continuous_batching import RESERVED_SLOT, Hybrid, backends_here
from mamba_ops.serving import PiecewiseRunner, Plan

SIZES: dict[str, dict[str, int]] = {
    "hidden 4096": {"hidden": 4096, "pairs": 2, "heads": 128, "head_dim": 64, "groups": 8, "dstate": 128},
    "hidden 8192": {"hidden": 8192, "pairs": 2, "heads": 256, "head_dim": 64, "groups": 8, "dstate": 128},
}
TINY = {"hidden": 64, "pairs": 1, "heads": 2, "head_dim": 16, "groups": 1, "dstate": 16}  # to try it on a CPU
STEPS = 100
LIMIT = 1.10


def kernels_us(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the sum of the own times of a step's kernels, and how many there are."""
    activity = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}[device.type]
    with profile(activities=[activity]) as profiler:
        for _ in range(20):
            step()
        torch.accelerator.synchronize()
    kernels = [e for e in profiler.events() if e.device_type != DeviceType.CPU]
    return sum(e.time_range.elapsed_us() for e in kernels) / 20, len(kernels) / 20


def step_us(step: Callable[[], object], device: torch.device) -> float:
    """Return the time of a step, the best of three rounds; steps follow each other without being waited for."""
    wait = torch.get_device_module(device).synchronize
    rounds = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        rounds.append(1e6 * (time.perf_counter() - start) / STEPS)
    return min(rounds)


def measure(sizes: dict[str, int], device: torch.device) -> list[Row]:
    torch._dynamo.reset()
    on_device, rows = device.type != "cpu", []
    with torch.device(device):
        model = Hybrid(length=160, **sizes).requires_grad_(False).to(torch.bfloat16)
    slot = model.new_pool(4).allocate()
    runner = PiecewiseRunner(
        model,
        max_tokens=1,
        max_requests=4,
        null_slot=RESERVED_SLOT,
        device=device,
        compile_piece="inductor" if on_device else "eager",
    )
    plan = Plan.of([100], [1], [slot], max_requests=4, null_slot=RESERVED_SLOT, device=device)
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    for backend in backends_here(device):
        with mamba_ops.use_backend(backend), torch.no_grad():
            runner.prepare(tokens)

            def full() -> None:
                runner(plan, tokens)

            def compiled() -> None:
                runner.compiled(tokens, plan)  # the same code, launched from Python

            compiled()
            row: Row = {"case": backend, "step": step_us(full, device), "compiled": step_us(compiled, device)}
            if on_device:
                row["kernels"], row["count"] = kernels_us(full, device)
                row["ratio"] = row["step"] / row["kernels"]
            rows.append(row)
    return rows


COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: str(row["case"]),
    "full graph, us": lambda row: number(row, "step"),
    "its kernels, us": lambda row: number(row, "kernels"),
    "kernels": lambda row: number(row, "count", digits=0),
    "step / kernels": lambda row: number(row, "ratio", digits=3),
    "launched from Python, us": lambda row: number(row, "compiled"),
}


def main() -> None:
    given = options("serving", __doc__, [*SIZES, "requests"])
    sizes = {given.op: SIZES[given.op]} if given.op in SIZES else {} if given.op else SIZES
    sizes = sizes if given.device.type != "cpu" or not sizes else {"tiny": TINY}
    known = facts(given)
    tables = {name: (COLUMNS, measure(size, given.device)) for name, size in sizes.items()}
    notes = [f"torch {known['torch']}, triton {known['triton']}"]
    if sizes:
        notes.append("one request, 2 Mamba-2 and 2 attention layers, bfloat16 weights, float32 states")
        notes.append("the copies of a step's tokens and plan are among the kernels")
    for name, (_, rows) in tables.items():
        for row in rows:
            if row.get("ratio", 0) > LIMIT:
                notes.append(f"FAILED: {name} on {row['case']}: {row['ratio']:.2f} times its kernels, expected {LIMIT}")
    if given.op in (None, "requests"):
        from benchmarks import serving_requests

        behind = {"flashinfer": "flashinfer:triton", "cpp": "cpp:torch"}  # what one refuses goes to the other
        backends = [behind.get(name, name) for name in backends_here(given.device)]
        with Progress(transient=True) as progress:
            rows = serving_requests.measure(given.device, backends, progress)
        tables["requests"] = (serving_requests.COLUMNS, rows)
        notes += serving_requests.NOTES
    results = {**known, "sizes": {name: rows for name, (_, rows) in tables.items()}}
    report(given, page("Serving", known, tables, notes), results)


if __name__ == "__main__":
    main()
