"""Tokens a second of one model in one run, on Triton and on FlashInfer, while the backend changes under it.

A Mamba-2-like decoder in bfloat16, states in float32, decodes a batch of streams: eagerly, compiled with CUDA graphs
(`mode="reduce-overhead"`), and in a graph captured by hand. Compiled, it reads on one backend after the other and back:
before and after a swap a step takes what the backend takes alone, and nothing is compiled again.
"""

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks import measure
from benchmarks.decoder import Decoder
from benchmarks.measure import Row
from mamba_ops import explain, record_selections, selective_state_update, use_backend
from mamba_ops.commands.watch import watch_compiler
from mamba_ops.registry import noticing_swaps

BASE, OTHER = "triton", "flashinfer"
BATCHES = (1, 8, 64)
MODEL = {"width": 1536, "heads": 48, "dstate": 128}  # of Mamba-2 780M; head_dim 64
WARM, TIMED, EAGER = 4, 200, 30  # steps
AGREEMENT = 2e-2  # of the largest logit: Inductor keeps in float32 what eager rounds to bfloat16 between its kernels
SAME_SPEED = 0.10  # how far the speed after a swap may be from that before


@dataclass(frozen=True)
class Reading:
    """Steps of the compiled model on one backend.

    Attributes:
        backend: its name.
        tokens_per_s: of all streams.
        recordings: CUDA graphs recorded during it.
        runs: runs of selective_state_update that Python saw; replays are not among them.
        difference: of the first step's logits from eager ones on that backend, relative to the largest.
    """

    backend: str
    tokens_per_s: float
    recordings: int
    runs: int
    difference: float


def decoder(batch: int, depth: int, device: torch.device) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(batch, depth=depth, **MODEL).to(device, torch.bfloat16)
    for layer in model.layers:
        layer.ssm_state = layer.ssm_state.float()
    return model


def why_not(model: Decoder, backend: str) -> str | None:
    """Return why a backend does not take the model's decode step, or None."""
    layer: Any = model.layers[0]
    batch, heads, dim, dstate = layer.ssm_state.shape
    new = layer.D.new_zeros
    B = new(batch, 1, dstate)
    options = {"D": layer.D, "dt_bias": layer.dt_bias, "dt_softplus": True}
    call = (layer.ssm_state, new(batch, heads, dim), new(batch, heads), -layer.A_log.exp(), B, B)
    with use_backend(selective_state_update=backend):
        return explain(selective_state_update, *call, **options).reasons.get(backend)


def tokens_per_s(step: Callable[[], object], batch: int, steps: int, device: torch.device) -> float:
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return batch * steps / (time.perf_counter() - start)


def read(model: Decoder, compiled: Callable[[Tensor], Tensor], tokens: Tensor, backend: str, watch: Any) -> Reading:
    """Take one step both ways from the same caches, then time compiled ones."""
    caches = [cache.clone() for cache in model.buffers()]
    recordings = watch.recordings

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(tokens)

    with use_backend(selective_state_update=backend), record_selections() as record:
        expected = model(tokens)
        for cache, value in zip(model.buffers(), caches, strict=True):
            cache.copy_(value)
        record.clear()
        got = step().clone()
        for _ in range(WARM):
            step()
        speed = tokens_per_s(step, len(tokens), TIMED, tokens.device)
    difference = float((got - expected).abs().max() / expected.abs().max())
    runs = [run.backend for run in record if run.op == selective_state_update.qualname]
    return Reading(backend, speed, watch.recordings - recordings, len(runs), difference)


def captured_tokens_per_s(model: Decoder, tokens: Tensor) -> float:
    """Speed of a graph of the eager step, captured by hand: no swap ever reaches it."""
    module = torch.get_device_module(tokens.device)
    graph = module.CUDAGraph()
    with noticing_swaps(), module.graph(graph):  # freed before the next swap
        model(tokens)
    graph.replay()
    return tokens_per_s(graph.replay, len(tokens), TIMED, tokens.device)


def measured(batch: int, depth: int, device: torch.device, backends: list[str]) -> tuple[list[Row], str, list[str]]:
    """Return a row for each backend, what was counted, and a sentence for each thing that is not as it should be."""
    torch._dynamo.reset()
    counters.clear()
    model = decoder(batch, depth, device)
    tokens = torch.randint(256, (batch,), device=device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    rows: dict[str, Row] = {}
    for backend in backends:
        with use_backend(selective_state_update=backend):
            for _ in range(WARM):
                model(tokens)
            eager = tokens_per_s(lambda: model(tokens), batch, EAGER, device)
            rows[backend] = {"case": f"{batch} streams", "backend": backend, "eager": eager}
            rows[backend]["captured"] = captured_tokens_per_s(model, tokens)
    with watch_compiler() as watch:
        readings = [read(model, compiled, tokens, backend, watch) for backend in backends * 2]
    found = []
    for i, reading in enumerate(readings):
        row, again = rows[reading.backend], i >= len(backends)
        row["after" if again else "before"] = reading.tokens_per_s
        row["difference"] = max(reading.difference, row.get("difference", 0.0))
        row["recordings"] = reading.recordings + row.get("recordings", 0)
        where = f"{batch} streams, {reading.backend}"
        if not reading.difference <= AGREEMENT:
            found.append(f"{where}: a logit is {reading.difference:.1e} off, expected at most {AGREEMENT:.0e}")
        if again and (reading.recordings or reading.runs):
            found.append(f"{where}: {reading.recordings} recordings and {reading.runs} runs, expected replays")
        if not again and not reading.recordings:
            found.append(f"{where}: nothing was recorded")
    for backend, row in rows.items():
        if abs(row["after"] / row["before"] - 1) > SAME_SPEED:
            found.append(f"{batch} streams, {backend}: {row['after'] / row['before']:.2f} of its speed after the swaps")
    skips = counters["inductor"]["cudagraph_skips"]
    counted = f"{watch.graphs} graph, {watch.recompiles} recompiles, {skips} CUDA graphs skipped"
    counted = f"{batch} streams, {len(readings)} readings by turns: {counted}, {watch.recordings} recorded"
    if (watch.graphs, watch.recompiles, skips, watch.recordings) != (1, 0, 0, len(backends)):
        found.append(f"{counted}, expected 1, 0, 0 and {len(backends)}")
    return list(rows.values()), counted, found


def _version(package: str) -> str:
    return f", {package} {importlib.import_module(package).__version__}"


def main() -> int:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--depth", type=int, default=12, help="layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument(
        "--save", type=Path, nargs="?", const=results, metavar="FOLDER", help="write a dated page (default: results/)"
    )
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or not hasattr(torch.get_device_module(device), "CUDAGraph"):
        print("benchmarks.tokens needs a GPU with CUDA graphs; there is none here.")
        return 0
    options.name, options.op, options.device = "tokens", None, device
    notes, backends = [], [BASE]
    with torch.no_grad():
        if OTHER in selective_state_update.kernels:
            reason = why_not(decoder(1, 1, device), OTHER)
        else:
            reason = "there is no such backend"
        if reason is None:
            backends.append(OTHER)
        else:
            notes.append(f"{OTHER} is left out: {reason}")
        rows, found = [], []
        for batch in BATCHES:
            new, counted, wrong = measured(batch, options.depth, device, backends)
            rows += new
            notes.append(counted)
            found += wrong
    facts = measure.facts(options)
    notes.append(f"torch {facts['torch']}, Triton {facts['triton']}{_version(OTHER) if OTHER in backends else ''}")
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "backend": lambda row: row["backend"],
        "eager": lambda row: f"{row['eager']:,.0f}",
        "captured by hand": lambda row: f"{row['captured']:,.0f}",
        "compiled, before a swap": lambda row: f"{row['before']:,.0f}",
        "and after": lambda row: f"{row['after']:,.0f}",
        "recorded": lambda row: str(row["recordings"]),
        "off by": lambda row: f"{row['difference']:.1e}",
    }
    model = f"{options.depth} layers, " + ", ".join(f"{name} {size}" for name, size in MODEL.items())
    notes.append(f"tokens a second of all streams; {model}; bfloat16, states float32")
    text = measure.page(
        "Tokens a second", facts, {"decode": (columns, rows)}, [*notes, *(f"FAILED: {f}" for f in found)]
    )
    measure.report(options, text, {**facts, "rows": rows, "problems": found})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
