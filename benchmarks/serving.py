"""Decode of one request under the full graph: a step's time, and how much of it its kernels take themselves.

The model is that of examples/continuous_batching.py with the sizes of large hybrids and random weights in bfloat16.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import mamba_ops
from examples.continuous_batching import NULL_SLOT, Hybrid, backends_here
from mamba_ops.demo.watch import device_name
from mamba_ops.serving import PiecewiseRunner, Plan

SIZES: dict[str, dict[str, int]] = {
    "hidden 4096, 2 pairs": {"hidden": 4096, "pairs": 2, "heads": 128, "groups": 8, "dstate": 128},
    "hidden 8192, 2 pairs": {"hidden": 8192, "pairs": 2, "heads": 256, "groups": 8, "dstate": 128},
}
TINY = {"hidden": 64, "pairs": 1, "heads": 2, "groups": 1, "dstate": 16}
STEPS = 100
LIMIT = 1.10


def kernels_us(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Return the time of a step's kernels, the sum of their own times, and how many there are."""
    activity = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}[
        torch.accelerator.current_accelerator().type
    ]
    with profile(activities=[activity]) as profiler:
        for _ in range(steps):
            step()
        torch.accelerator.synchronize()
    kernels = [e for e in profiler.events() if e.device_type != DeviceType.CPU]
    return sum(e.time_range.elapsed_us() for e in kernels) / steps, len(kernels) / steps


def step_us(step: Callable[[], object], steps: int, *, on_device: bool) -> float:
    """Return the time of a step, steps following each other without waiting for one another."""
    wait = torch.accelerator.synchronize if on_device else lambda: None
    best = float("inf")
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        best = min(best, (time.perf_counter() - start) / steps)
    return 1e6 * best


def measure(sizes: dict[str, int], device: torch.device, backends: list[str]) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    on_device, rows = device.type != "cpu", []
    with torch.device(device):
        model = Hybrid(head_dim=64 if on_device else 16, length=160, **sizes).requires_grad_(False)
    model.to(torch.bfloat16)
    slot = model.new_pool(4).take()
    runner = PiecewiseRunner(
        model,
        max_tokens=1,
        max_requests=4,
        null_slot=NULL_SLOT,
        device=device,
        compile_piece="inductor" if on_device else "eager",
    )
    plan = Plan.of([100], [1], [slot], max_requests=4, null_slot=NULL_SLOT, device=device)
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    for backend in backends:
        with mamba_ops.use_backend(backend), torch.no_grad():
            runner.prepare(tokens)

            def full() -> None:
                runner(plan, tokens)

            def compiled() -> None:
                runner.compiled(tokens, plan)  # the same compiled code, launched from Python

            compiled()
            row: dict[str, Any] = {"backend": backend, "step_us": step_us(full, STEPS, on_device=on_device)}
            row["compiled_us"] = step_us(compiled, STEPS, on_device=on_device)
            if on_device:
                row["kernels_us"], row["kernels"] = kernels_us(full, 20)
                row["ratio"] = row["step_us"] / row["kernels_us"]
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    given = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    backends = backends_here(device)
    results: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "sizes": {}}
    console = Console(width=120, highlight=False)
    for name, sizes in (SIZES if device.type != "cpu" else {"tiny": TINY}).items():
        rows = results["sizes"][name] = measure(sizes, device, backends)
        table = Table(title=f"{name}: decode of one request, {results['device']}, torch {torch.__version__}")
        for column in ("backend", "full graph, us", "its kernels, us", "kernels", "ratio", "launched from Python, us"):
            table.add_column(column, justify="left" if column == "backend" else "right")
        for row in rows:
            cells = [f"{row['step_us']:.1f}", *(f"{row[k]:{f}}" if k in row else "-" for k, f in COLUMNS.items())]
            table.add_row(row["backend"], *cells, f"{row['compiled_us']:.1f}")
        console.print(table)
        for row in rows:
            if row.get("ratio", 0) > LIMIT:
                console.print(f"FAILED: {row['backend']}: {row['ratio']:.2f} of its kernels' time, expected {LIMIT}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


COLUMNS = {"kernels_us": ".1f", "kernels": ".0f", "ratio": ".3f"}

if __name__ == "__main__":
    main()
