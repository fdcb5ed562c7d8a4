"""Requests in real shapes: time to the first token and between tokens, through an engine with prefix reuse.

The engine is that of examples/shared_prefixes.py. Requests arrive by a seeded process, several begin alike, and a clock
runs with the wall but skips the time in which nobody is there.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from rich.progress import Progress
from torch import Tensor, nn

import mamba_ops
from benchmarks.measure import Row, number
from examples.shared_prefixes import VOCABULARY, Engine, Request
from mamba_ops.layers import GatedDeltaNet, Mamba2
from mamba_ops.serving import PiecewiseRunner, Plan, StatePool

COUNTS = (1, 16, 64)
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"hidden": 64, "head": 16, "pairs": 1, "prefix": 64, "tail": 16, "new": 8, "budget": 128, "gap": 0.02},
    "gpu": {
        "hidden": 2048,
        "head": 64,
        "pairs": 2,
        "prefix": 1024,
        "tail": 256,
        "new": 64,
        "budget": 2048,
        "gap": 0.01,
    },
}
PREFIXES, BLOCK, ROUNDS = 4, 64, 3


class Hybrid(nn.Module):
    """Layers of Mamba-2 and of the gated delta rule by turns; its caches are in `pool`."""

    pool: StatePool

    def __init__(self, hidden: int, head: int, pairs: int) -> None:
        super().__init__()
        heads, wide = 2 * hidden // head, 128 if hidden >= 1024 else head
        self.embedding, self.layers = nn.Embedding(VOCABULARY, hidden), nn.ModuleDict()
        for i in range(pairs):
            self.layers[f"mamba2_{i}"] = Mamba2(hidden, heads=heads, head_dim=head, dstate=wide, chunk_size=64)
            sizes = {
                "head_k_dim": wide,
                "head_v_dim": wide,
                "num_k_heads": hidden // wide,
                "num_v_heads": hidden // wide,
            }
            self.layers[f"gdn_{i}"] = GatedDeltaNet(hidden, **sizes)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in self.layers)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def new_pool(self, slots: int, *, columns: int = 1) -> StatePool:
        """Caches for so many slots; those that there are, where these are as many: graphs know their addresses."""
        if not hasattr(self, "pool") or self.pool.slots != slots or self.pool.allocated:
            self.pool = StatePool.of(dict(self.layers.items()), slots, columns=columns)
        return self.pool

    def forward(self, tokens: Tensor, plan: Plan) -> Tensor:
        """The logits after each of a step's tokens."""
        hidden = self.embedding(tokens)
        for norm, (name, layer) in zip(self.norms, self.layers.items(), strict=True):
            hidden = hidden + layer(norm(hidden), *self.pool.caches[name], plan=plan)
        return cast(Tensor, self.head(hidden))


@dataclass
class Clock:
    """Where a run's seconds go: what the host takes to launch steps, the wait for the device, and the engine's own."""

    skipped: float = 0.0
    launching: float = 0.0
    waiting: float = 0.0
    steps: list[tuple[int, float]] = field(default_factory=list)
    """Of each step its tokens and its seconds."""

    def now(self) -> float:
        return time.perf_counter() + self.skipped


def requests_of(count: int, sizes: dict[str, Any], seed: int = 0) -> list[tuple[float, list[int]]]:
    """When each request arrives, in seconds, and its prompt: one of a few beginnings, then text of its own."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(VOCABULARY) for _ in range(sizes["prefix"])] for _ in range(PREFIXES)]
    found, now = [], 0.0
    for _ in range(count):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(sizes["tail"] // 4, sizes["tail"]))]
        found.append((now, [*rng.choice(beginnings), *own]))
        now += rng.expovariate(1 / sizes["gap"])
    return found


def served(
    run: Callable[[Plan, Tensor], Tensor],
    model: Hybrid,
    work: Sequence[tuple[float, list[int]]],
    sizes: dict[str, Any],
    most: int,
    after: Callable[[], object] = lambda: None,
) -> Row:
    """Serve requests as they arrive, `most` at a time, and return what was measured; `after` is called after each that
    is done.
    """
    device, clock = model.head.weight.device, Clock()

    def timed(plan: Plan, tokens: Tensor) -> Tensor:
        start = time.perf_counter()
        logits = run(plan, tokens)
        launched = time.perf_counter()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        clock.launching += launched - start
        clock.waiting += time.perf_counter() - launched
        clock.steps.append((plan.tokens, 0.0))
        return logits

    count = len(work)
    engine = Engine(
        cast(Any, model),
        slots=slots_for(most, sizes),
        most_running=most,
        budget=sizes["budget"],
        block_size=BLOCK,
        drafts=0,
        rounds=ROUNDS,
        run=timed,
    )
    arrivals = [(when, Request(list(prompt), sizes["new"])) for when, prompt in work]
    total = sum(len(prompt) for _, prompt in work)
    written: dict[Request, list[float]] = {request: [] for _, request in arrivals}
    lengths, begin, later = {request: len(request.tokens) for request in written}, clock.now(), list(arrivals)
    while later or engine.waiting or engine.running:
        if later and not engine.waiting and not engine.running:
            clock.skipped += max(0.0, later[0][0] - (clock.now() - begin))
        while later and later[0][0] <= clock.now() - begin:
            engine.add(later.pop(0)[1])
        start = time.perf_counter()
        engine.step()
        now = clock.now() - begin
        clock.steps[-1] = clock.steps[-1][0], time.perf_counter() - start
        for request, times in written.items():
            if len(request.tokens) > lengths[request]:
                lengths[request] = len(request.tokens)
                times.append(now)
                if request.done:
                    after()
    while engine.prefixes.evict():
        pass  # the pool is empty again
    first = [times[0] - when for (when, _), times in zip(arrivals, written.values(), strict=True)]
    gaps = [b - a for times in written.values() for a, b in pairwise(times)]
    seconds = sum(spent for _, spent in clock.steps)
    return {
        "requests": count,
        "steps": engine.steps,
        "tokens a second": sum(map(len, written.values())) / seconds,
        "found": sum(request.found for request in written) / total,
        **{f"first {q}": value for q, value in quantiles(first).items()},
        **{f"between {q}": value for q, value in quantiles(gaps).items()},
        "launching": clock.launching / seconds,
        "waiting": clock.waiting / seconds,
        "engine": 1 - (clock.launching + clock.waiting) / seconds,
        "prompts": sum(spent for tokens, spent in clock.steps if tokens > count) / seconds,
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    if len(seconds) < 2:
        return dict.fromkeys(("p50", "p99"), 1e3 * (seconds[0] if seconds else 0.0))
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98]}


def slots_for(count: int, sizes: dict[str, Any]) -> int:
    """Slots for so many requests, and for what beginnings have in common."""
    return count + 2 * PREFIXES * (sizes["prefix"] // BLOCK + 2)


def measure(
    device: torch.device, backends: Sequence[str], progress: Progress, counts: Sequence[int] = COUNTS
) -> list[Row]:
    """Serve each number of requests on each backend."""
    is_cpu, rows = device.type == "cpu", []
    sizes = SIZES["cpu" if is_cpu else "gpu"]
    task = progress.add_task("requests", total=len(backends) * sum(counts))
    torch.manual_seed(0)
    with torch.device(device):
        model = Hybrid(sizes["hidden"], sizes["head"], sizes["pairs"]).requires_grad_(False)
    model = model if is_cpu else model.to(torch.bfloat16)
    most = max(counts)
    model.new_pool(slots_for(most, sizes))
    runner = PiecewiseRunner(
        model,
        max_tokens=sizes["budget"],
        max_requests=ROUNDS * most,
        shared=True,
        rounds=ROUNDS,
        device=device,
        compile_piece="eager" if is_cpu else "inductor",
    )
    for backend in backends:
        with mamba_ops.use_backend(backend), torch.no_grad():
            runner.prepare(torch.zeros(1, dtype=torch.int64, device=device))
            served(runner, model, requests_of(4, sizes, seed=1), sizes, most)  # compiles what is left
            for count in counts:
                row = served(runner, model, requests_of(count, sizes), sizes, most, lambda: progress.advance(task))
                rows.append({"case": backend, **row})
    return rows


COLUMNS: dict[str, Callable[[Row], str]] = {
    "requests": lambda row: str(row["requests"]),
    "case": lambda row: str(row["case"]),
    "first token, ms": lambda row: number(row, "first p50"),
    "p99": lambda row: number(row, "first p99"),
    "between tokens, ms": lambda row: number(row, "between p50", digits=2),
    " p99": lambda row: number(row, "between p99", digits=2),
    "tokens/s": lambda row: number(row, "tokens a second", digits=0),
    "steps": lambda row: str(row["steps"]),
    "not read": lambda row: f"{row['found']:.0%}",
    "launching": lambda row: f"{row['launching']:.0%}",
    "device": lambda row: f"{row['waiting']:.0%}",
    "engine": lambda row: f"{row['engine']:.0%}",
    "with prompts": lambda row: f"{row['prompts']:.0%}",
}
NOTES = (
    "requests: prompts of one of four beginnings and text of their own, arriving by a seeded Poisson process",
    "not read: tokens of prompts whose state was known, as others began alike",
    "of the time of all steps: launching, what the host takes to start them (a CPU: to run them); device, its waiting",
    "engine: plans, prefixes and bookkeeping; with prompts: of all time, that of steps that read prompts",
)
