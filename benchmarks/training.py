"""Forward and backward as autograd runs them: ours on Triton beside mamba_ssm's and causal-conv1d's kernels.

Agreement is that of all gradients with our torch reference in float32, relative to the largest. On a CPU ours runs
alone, in Triton's interpreter on small sizes, and only agreement is shown.
"""

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Row, number, ratio

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]


def conv_inputs(device: torch.device) -> Inputs:
    """The convolution of a Mamba-2 layer of 4096 channels, 8 rows of 2048 tokens."""
    rows, length, dim = (2, 40, 32) if device.type == "cpu" else (8, 2048, 4352)
    random = partial(measure.random, device=device)
    return {"x": random(rows, length, dim), "weight": random(dim, 4), "bias": random(dim)}


def scan_inputs(device: torch.device) -> Inputs:
    """The recurrence of that layer: 64 heads of 64 channels, a state of 128, one group."""
    rows, length, heads, dim, dstate = (1, 80, 2, 16, 16) if device.type == "cpu" else (8, 2048, 64, 64, 128)
    random = partial(measure.random, device=device)
    inputs = {"x": random(rows, length, heads, dim), "dt": random(rows, length, heads)}
    inputs["A"] = -1 - 15 * torch.rand(heads, device=device)
    inputs |= {name: random(rows, length, 1, dstate) for name in ("B", "C")}
    return inputs | {"D": torch.randn(heads, device=device), "dt_bias": torch.randn(heads, device=device) - 3}


def our_scan(inputs: Inputs) -> Tensor:
    import mamba_ops

    return mamba_ops.mamba_chunk_scan(**inputs, chunk_size=256, dt_softplus=True)


def our_conv(inputs: Inputs) -> Tensor:
    import mamba_ops

    return mamba_ops.causal_conv1d(**inputs)


def peer_scan(inputs: Inputs, chunk_size: int) -> Tensor:
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    output: Tensor = scan(**inputs, chunk_size=chunk_size, dt_softplus=True)
    return output


def peer_conv(inputs: Inputs) -> Tensor:
    conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    x = inputs["x"].transpose(1, 2)
    output: Tensor = conv(x, inputs["weight"], inputs["bias"], activation="silu")
    return output.transpose(1, 2)


CASES: dict[str, tuple[Callable[[torch.device], Inputs], dict[str, Call]]] = {
    "causal_conv1d": (conv_inputs, {"ours": our_conv, "causal-conv1d": peer_conv}),
    "mamba_chunk_scan": (
        scan_inputs,
        {"ours": our_scan, **{f"mamba_ssm, chunk {n}": partial(peer_scan, chunk_size=n) for n in (128, 256)}},
    ),
}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["name"],
    "forward us": lambda row: number(row, "forward"),
    "forward + backward us": lambda row: number(row, "both"),
    "ours/this": lambda row: ratio(row, "ours", "both"),
    "peak MiB": lambda row: number(row, "peak", 2**20),
    "worst gradient": lambda row: f"{row['error']:.1e}",
}


def gradients(call: Call, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    return list(torch.autograd.grad(call(leaves), list(leaves.values()), grad))


def measured(call: Call, ours: Call, inputs: Inputs, device: torch.device) -> Row:
    """Time, memory and the error of a contestant; `ours` in float32 on torch is the truth."""
    from mamba_ops import use_backend

    grad = torch.randn_like(inputs["x"])
    with use_backend("triton"):
        found = gradients(call, inputs, grad)
    with use_backend("torch"):
        truth = gradients(ours, {n: t.float() for n, t in inputs.items()}, grad.float())
    errors = [(g.float() - t).abs().max() / t.abs().max() for g, t in zip(found, truth, strict=True)]
    row: Row = {"error": float(torch.stack(errors).max())}
    if device.type != "cpu":
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        module = torch.get_device_module(device)
        with use_backend("triton"):
            row["forward"] = measure.bench_us(lambda: call(leaves))
            row["both"] = measure.bench_us(lambda: torch.autograd.grad(call(leaves), list(leaves.values()), grad))
            before = module.memory_allocated(device)
            module.reset_peak_memory_stats(device)
            torch.autograd.grad(call(leaves), list(leaves.values()), grad)
            row["peak"] = module.max_memory_allocated(device) - before
    return row


def main() -> int:
    options = measure.options("training", __doc__ or "", CASES)
    tables, notes = {}, []
    for op, (make, calls) in CASES.items():
        if options.op not in (None, op):
            continue
        rows: list[Row] = []
        inputs = make(options.device)
        for name, call in calls.items():
            try:
                row = measured(call, calls["ours"], inputs, options.device) | {"name": name}
            except ImportError as error:
                notes.append(f"{name}: {error}")
                continue
            rows.append(row | ({"ours": rows[0]["both"] if rows else row["both"]} if "both" in row else {}))
        tables[op] = COLUMNS, rows
    facts = measure.facts(options)
    results: dict[str, Any] = {**facts, "tables": {op: rows for op, (_, rows) in tables.items()}}
    measure.report(options, measure.page("Training", facts, tables, notes), results)
    return int(any(row["error"] > 0.05 for _, rows in tables.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
