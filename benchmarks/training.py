"""Forward and backward as autograd runs them: ours on Triton beside mamba_ssm's and causal-conv1d's kernels.

Agreement is that of all gradients with our torch reference in float32, relative to the largest. On a CPU ours runs
alone, in Triton's interpreter on small sizes, and only agreement is shown.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.measure import Row, number, ratio
from mamba_ops.commands.bench import clocks

Inputs = dict[str, Any]
Call = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Contestant:
    call: Call
    channel_major: bool = False  # whether it is given inputs whose tokens are neighbours, channel by channel

    def arranged(self, inputs: Inputs) -> Inputs:
        if not self.channel_major:
            return inputs
        return {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t for n, t in inputs.items()}


def conv_inputs(device: torch.device) -> Inputs:
    """The convolution of a Mamba-2 layer of 4096 channels, 8 rows of 2048 tokens."""
    rows, length, dim = (2, 40, 32) if device.type == "cpu" else (8, 2048, 4352)
    random = partial(clocks.random, device=device)
    return {"x": random(rows, length, dim), "weight": random(dim, 4), "bias": random(dim)}


def scan_inputs(device: torch.device) -> Inputs:
    """The recurrence of that layer: 64 heads of 64 channels, a state of 128, one group."""
    rows, length, heads, dim, dstate = (1, 80, 2, 16, 16) if device.type == "cpu" else (8, 2048, 64, 64, 128)
    random = partial(clocks.random, device=device)
    inputs = {"x": random(rows, length, heads, dim), "dt": random(rows, length, heads)}
    inputs["A"] = -1 - 15 * torch.rand(heads, device=device)
    inputs |= {name: random(rows, length, 1, dstate) for name in ("B", "C")}
    return inputs | {"D": torch.randn(heads, device=device), "dt_bias": torch.randn(heads, device=device) - 3}


def selective_inputs(device: torch.device) -> Inputs:
    """The recurrence of a Mamba-1 layer of 4096 channels, 8 rows of 1024 tokens."""
    rows, length, dim, dstate = (1, 40, 32, 4) if device.type == "cpu" else (8, 1024, 4096, 16)
    random = partial(clocks.random, device=device)
    inputs = {name: random(rows, length, dim) for name in ("x", "dt")}
    inputs["A"] = -1 - 15 * torch.rand(dim, dstate, device=device)
    inputs |= {name: random(rows, length, dstate) for name in ("B", "C")}
    return inputs | {"D": torch.randn(dim, device=device), "dt_bias": torch.randn(dim, device=device) - 3}


def delta_inputs(device: torch.device) -> Inputs:
    """A layer of Qwen3-Next: 16 heads of q and k, 32 of v, 4 rows of 2048 tokens; gates as the layer computes them."""
    rows, length, k_heads, v_heads, dim = (1, 80, 1, 2, 16) if device.type == "cpu" else (4, 2048, 16, 32, 128)
    random = partial(clocks.random, device=device)
    inputs = {name: random(rows, length, k_heads, dim) for name in ("q", "k")}
    inputs["v"] = random(rows, length, v_heads, dim)
    inputs["g"] = -0.1 * torch.nn.functional.softplus(torch.randn(rows, length, v_heads, device=device))
    return inputs | {"beta": random(rows, length, v_heads).sigmoid()}


def our_scan(inputs: Inputs) -> Tensor:
    import mamba_ops

    return mamba_ops.mamba_chunk_scan(**inputs, chunk_size=256, dt_softplus=True)


def our_conv(inputs: Inputs) -> Tensor:
    import mamba_ops

    return mamba_ops.causal_conv1d(**inputs)


def our_selective_scan(inputs: Inputs) -> Tensor:
    import mamba_ops

    return mamba_ops.selective_scan(**inputs, dt_softplus=True)


def our_delta_rule(inputs: Inputs) -> Tensor:
    import mamba_ops

    return mamba_ops.chunk_gated_delta_rule(**inputs, qk_l2norm=True)


def peer_selective_scan(inputs: Inputs) -> Tensor:
    scan = peers.module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    x, dt, B, C = (inputs[name].transpose(1, 2) for name in ("x", "dt", "B", "C"))
    output: Tensor = scan(x, dt, inputs["A"], B, C, inputs["D"], None, inputs["dt_bias"], True)
    return output.transpose(1, 2)


def peer_scan(inputs: Inputs, chunk_size: int) -> Tensor:
    scan = peers.module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    output: Tensor = scan(**inputs, chunk_size=chunk_size, dt_softplus=True)
    return output


def peer_conv(inputs: Inputs) -> Tensor:
    conv = peers.module("causal_conv1d").causal_conv1d_fn
    x = inputs["x"].transpose(1, 2)
    output: Tensor = conv(x, inputs["weight"], inputs["bias"], activation="silu")
    return output.transpose(1, 2)


CASES: dict[str, tuple[Callable[[torch.device], Inputs], dict[str, Contestant]]] = {
    "causal_conv1d": (conv_inputs, {"ours": Contestant(our_conv), "causal-conv1d": Contestant(peer_conv)}),
    "mamba_chunk_scan": (
        scan_inputs,
        {
            "ours": Contestant(our_scan),
            **{f"mamba_ssm, chunk {n}": Contestant(partial(peer_scan, chunk_size=n)) for n in (128, 256)},
        },
    ),
    "selective_scan": (
        selective_inputs,
        {
            "ours": Contestant(our_selective_scan),
            "ours, channel-major": Contestant(our_selective_scan, channel_major=True),
            "mamba_ssm": Contestant(peer_selective_scan, channel_major=True),
        },
    ),
    "chunk_gated_delta_rule": (delta_inputs, {"ours": Contestant(our_delta_rule)}),
}
COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["name"],
    "forward us": lambda row: number(row, "forward"),
    "forward + backward us": lambda row: number(row, "both"),
    "ours/this": lambda row: ratio(row, "ours", "both"),
    "kept MiB": lambda row: number(row, "kept", 2**20),
    "peak MiB": lambda row: number(row, "peak", 2**20),
    "worst gradient": lambda row: f"{row['error']:.1e}",
}


def gradients(call: Call, inputs: Inputs, grad: Tensor) -> list[Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    return list(torch.autograd.grad(call(leaves), list(leaves.values()), grad))


def measured(contestant: Contestant, ours: Call, inputs: Inputs, device: torch.device) -> Row:
    """Time, memory and the error of a contestant; `ours` in float32 on torch is the truth.

    What is kept is what a forward leaves allocated, its output included; the peak is that of forward and backward.
    """
    from mamba_ops import use_backend

    call, inputs = contestant.call, contestant.arranged(inputs)
    with use_backend("torch"):
        precise = {n: t.float() for n, t in inputs.items()}
        grad = torch.randn_like(ours(inputs))
        truth = gradients(ours, precise, grad.float())
    with use_backend("triton"):
        found = gradients(call, inputs, grad)
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
            output = call(leaves)
            row["kept"] = module.memory_allocated(device) - before
            torch.autograd.grad(output, list(leaves.values()), grad)
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
        for name, contestant in calls.items():
            try:
                row = measured(contestant, calls["ours"].call, inputs, options.device) | {"name": name}
            except ImportError as error:
                notes.append(f"{name}: {error}")
                continue
            rows.append(row | ({"ours": rows[0]["both"] if rows else row["both"]} if "both" in row else {}))
        tables[op] = COLUMNS, rows
    facts = measure.facts(options)
    if options.device.type != "cpu":
        versions = {**{name: facts[name] for name in ("torch", "triton")}, **peers.versions()}
        notes.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    results: dict[str, Any] = {**facts, "tables": {op: rows for op, (_, rows) in tables.items()}}
    measure.report(options, measure.page("Training", facts, tables, notes), results)
    return int(any(row["error"] > 0.05 for _, rows in tables.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
