"""Serve 64 requests that come and go: a hybrid of Mamba-2 and attention, its caches by slot, a plan for every step.

Run it with `python examples/continuous_batching.py` (it needs `mamba-ops[cli]`); `--help` lists what can be otherwise.
The model has random weights and reads and writes bytes. Every request gets, token for token, what it gets alone.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import mamba_ops
from mamba_ops.layers import Mamba2
from mamba_ops.registry import Backend, mark_splitting
from mamba_ops.serving import PiecewiseRunner, Plan, StatePool

VOCABULARY = 256
RESERVED_SLOT = 0  # of padding rows; engines reserve block 0
SMALL = {"hidden": 128, "pairs": 2, "heads": 4, "head_dim": 64, "dstate": 64, "length": 160}

# ---- the model -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("continuous_batching::attention", mutates_args=("cache", "out"))
def attention(qkv: Tensor, cache: Tensor, slot: Tensor, place: Tensor, seen: Tensor, out: Tensor) -> None:
    """Attend from every token to its own request's tokens so far, decodes and prompts alike.

    It reads nothing on the host, so it can be captured; it is simple, not fast: each token looks at a whole slot.

    Args:
        qkv: (tokens, 3, heads, head_dim).
        cache: keys and values (slots, length, 2, heads, head_dim), mutated.
        slot, place: (tokens,): where in the cache each token is.
        seen: bool (tokens, length): which places of its slot each token looks at.
        out: (tokens, heads, head_dim), mutated.
    """
    cache[slot, place] = qkv[:, 1:]
    # What was in the slot before may be anything, NaN too: no weight of zero would hide that.
    k, v = torch.where(seen[:, :, None, None, None], cache[slot], 0).transpose(1, 3).unbind(2)
    result = functional.scaled_dot_product_attention(qkv[:, 0].unsqueeze(2), k, v, attn_mask=seen[:, None, None])
    out.copy_(result.squeeze(2))


mark_splitting("continuous_batching::attention")  # engines cut there, too


class Attention(nn.Module):
    """Attention without positions: the Mamba layers tell the order."""

    def __init__(self, hidden: int, heads: int, length: int) -> None:
        super().__init__()
        self.cache, self.by_head = (length, 2, heads, hidden // heads), (3, heads, hidden // heads)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def empty_caches(self, slots: int) -> tuple[Tensor]:
        return (self.qkv.weight.new_zeros(slots, *self.cache),)

    def forward(self, hidden: Tensor, cache: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        out = torch.empty_like(hidden).unflatten(1, self.by_head[1:])
        attention(self.qkv(hidden).unflatten(1, self.by_head), cache, *places, out)
        return cast(Tensor, self.out(out.flatten(1)))


class Hybrid(nn.Module):
    """A language model of `pairs` of a Mamba-2 and an attention layer."""

    def __init__(
        self, *, hidden: int, pairs: int, heads: int, head_dim: int, dstate: int, length: int, groups: int = 1
    ) -> None:
        super().__init__()
        sizes = {"heads": heads, "head_dim": head_dim, "dstate": dstate, "groups": groups, "chunk_size": 32}
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList()
        for _ in range(pairs):
            self.layers.append(Mamba2(hidden, **sizes))
            self.layers.append(Attention(hidden, hidden // head_dim, length))
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in self.layers)
        self.last_norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        self.length, self.pool = length, cast(StatePool | None, None)

    def new_pool(self, slots: int) -> StatePool:
        """Caches for `slots` requests and the null slot; from now on these are the model's."""
        exact = self.head.weight.dtype  # no state is less exact than the weights
        templates = {
            str(i): [cache.to(torch.promote_types(cache.dtype, exact)) for cache in layer.empty_caches(0)]
            for i, layer in enumerate(self.layers)
        }
        self.pool = StatePool(templates, slots + 1, null_slot=RESERVED_SLOT)
        return self.pool

    def forward(self, tokens: Tensor, plan: Plan) -> Tensor:
        """The logits after each of a step's tokens."""
        assert self.pool is not None
        hidden, places = self.embedding(tokens), self._places(tokens, plan)
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            caches = self.pool.caches[str(i)]
            if isinstance(layer, Attention):
                hidden = hidden + layer(norm(hidden), *caches, places)
            else:
                hidden = hidden + layer(norm(hidden), *caches, plan=plan)
        return cast(Tensor, self.head(self.last_norm(hidden)))

    def _places(self, tokens: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """For each token, padding too: its request's slot, how many tokens went before, and which places it sees."""
        cu_seqlens, slots, computed = plan.tensors.cu_seqlens, plan.tensors.slots, plan.tensors.num_computed_tokens
        token = torch.arange(tokens.shape[0], device=tokens.device, dtype=torch.int32)
        # Not in cu_seqlens[1:]: on a GPU, Inductor of torch 2.11 looks a slice up from its tensor's beginning.
        row = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(max=slots.shape[0] - 1)
        slot = torch.where(token < cu_seqlens[-1], slots[row, 0], RESERVED_SLOT).clamp(min=RESERVED_SLOT)
        place = (computed[row] + token - cu_seqlens[row]).clamp(0, self.length - 1)
        seen = torch.arange(self.length, device=tokens.device) <= place.unsqueeze(1)
        return slot.long(), place.long(), seen


# ---- the engine ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A text to continue.

    Attributes:
        prompt: its tokens.
        new: how many tokens to write.
        forced: what to write, whatever the model says; to compare its logits alone. None: its own choice.
        output: what was written.
        logits: that each token of it was chosen by.
        computed: how many of its tokens its caches have seen.
    """

    prompt: list[int]
    new: int
    arrival: int = 0
    forced: list[int] | None = None
    output: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    computed: int = 0
    slot: int = -1

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def done(self) -> bool:
        return len(self.output) == self.new

    def take(self, logits: Tensor, choice: int) -> None:
        self.logits.append(logits)
        self.output.append(choice if self.forced is None else self.forced[len(self.output)])


class Engine:
    """Runs as many requests at a time as there are slots; each step has one token of every request that writes, and
    prompts, in chunks, as far as the step's budget goes.

    Attributes:
        waiting, running: requests that have no slot yet, and those that have one.
        steps: how many there were; `mixed` of them had both decodes and prefills.
    """

    def __init__(self, model: Hybrid, *, slots: int = 16, budget: int = 64, **options: Any) -> None:
        """Make the caches; `options` are the runner's."""
        self.device = model.head.weight.device
        self.pool, self.slots, self.budget = model.new_pool(slots), slots, budget
        options = {"max_tokens": budget, "max_requests": slots, "null_slot": RESERVED_SLOT, **options}
        self.runner = PiecewiseRunner(model, device=self.device, **options)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.steps = self.mixed = 0

    def add(self, request: Request, length: int) -> None:
        if not request.prompt or len(request.prompt) + request.new > length:
            got = f"a prompt of {len(request.prompt)} tokens and {request.new} new ones"
            raise ValueError(f"Engine.add: got {got}, expected a prompt, and {length} in all")
        self.waiting.append(request)

    def step(self) -> None:
        """Advance the running requests. Without any, the step is empty.

        After an exception the requests of the step read all of their tokens again, because some of their caches may be
        ahead of others; other requests' were not touched.
        """
        while self.waiting and self.pool.num_free:
            request = self.waiting.pop(0)
            request.slot = self.pool.allocate()
            self.running.append(request)
        batch, new, left = [], [], self.budget
        for request in sorted(self.running, key=lambda r: len(r.tokens) - r.computed > 1):  # those that write go first
            if part := min(len(request.tokens) - request.computed, left):
                batch.append(request)
                new.append(part)
                left -= part
        plan = Plan.of(
            [r.computed for r in batch],
            new,
            [r.slot for r in batch],
            max_requests=self.slots,
            null_slot=RESERVED_SLOT,
            device=self.device,
        )
        order = [(batch[i], new[i]) for i in plan.order]
        read = [token for r, n in order for token in r.tokens[r.computed : r.computed + n]]
        try:
            logits = self.runner(plan, torch.tensor(read, dtype=torch.int64))
        except Exception:
            for request in batch:
                request.computed = 0
            raise
        self.steps += 1
        counts = cast(Tensor, plan.tensors.counts)
        self.mixed += bool(counts[0] and counts[2])
        self._write(order, logits)

    def _write(self, order: Iterable[tuple[Request, int]], logits: Tensor) -> None:
        """Give each request that has read all of its tokens one more, and let go of those that have enough."""
        writers, places, end = [], [], 0
        for request, n in order:
            end += n
            request.computed += n
            if request.computed == len(request.tokens):
                writers.append(request)
                places.append(end - 1)
        if not writers:
            return
        last = logits[torch.tensor(places, device=logits.device)]
        for request, row, choice in zip(writers, last.float().cpu(), last.argmax(-1).tolist(), strict=True):
            request.take(row, choice)
            if request.done:
                self.running.remove(request)
                self.pool.free(request.slot)


def alone(model: Hybrid, request: Request) -> Request:
    """Return the same request, run by itself: without engine, runner or compiler."""
    own = Request(request.prompt, request.new, forced=request.forced)
    pool = model.pool
    slot = model.new_pool(1).allocate()
    read = own.prompt
    with torch.no_grad():
        while not own.done:
            device = model.head.weight.device
            plan = Plan.of([own.computed], [len(read)], [slot], max_requests=1, null_slot=RESERVED_SLOT, device=device)
            logits = model(torch.tensor(read, device=device), plan)[-1]
            own.computed += len(read)
            own.take(logits.float().cpu(), int(logits.argmax()))
            read = own.output[-1:]
    model.pool = pool
    return own


# ---- the run ---------------------------------------------------------------------------------------------------------


def new_requests(count: int, *, seed: int, length: int, forced: bool = False) -> list[Request]:
    """Draw requests from a text: prompts of all lengths, that arrive one after the other."""
    text = (Path(__file__).resolve().parents[1] / "LICENSE").read_bytes()
    rng = random.Random(seed)
    requests, arrival = [], 0.0
    for _ in range(count):
        prompt, new = rng.randint(3, length // 2), rng.randint(2, length // 4)
        begin = rng.randrange(len(text) - length)
        arrival += rng.expovariate(0.6)
        after = list(text[begin + prompt : begin + prompt + new]) if forced else None
        requests.append(Request(list(text[begin : begin + prompt]), new, int(arrival), after))
    return requests


def backends_here(device: torch.device) -> list[str]:
    """The backends that run a decode here, by priority; where there is one alone, a second that borrows its kernels."""
    decode = mamba_ops.selective_state_update
    usable = [b.name for b in mamba_ops.registry.backends() if b.name in decode.kernels]
    usable = [
        n for n in usable if mamba_ops.registry.dispatcher.dispatcher.backends[n].why_unusable(device.type) is None
    ]
    if len(usable) == 1:
        borrowed = Backend("borrowed", devices=None, priority=-1)
        for op in (decode, mamba_ops.mamba_chunk_scan):
            borrowed.implements(op)(op.kernels[usable[0]].function)
        usable.append("borrowed")
    return usable


def serve(
    engine: Engine, requests: Sequence[Request], backends: Sequence[str], length: int, console: Console
) -> Counter[str]:
    """Serve all requests, half of them on one backend, the others on the next; return how often each was launched."""
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    coming, now, done = sorted(requests, key=lambda r: r.arrival), 0, 0
    with Progress(*columns, console=console) as progress, mamba_ops.record_selections() as record:
        bar = progress.add_task("", total=len(requests))
        for backend, enough in zip(backends, (len(requests) // 2, len(requests)), strict=True):
            with mamba_ops.use_backend(backend):
                while done < enough:
                    while coming and coming[0].arrival <= now:
                        engine.add(coming.pop(0), length)
                    engine.step()
                    now += 1
                    done = sum(r.done for r in requests)
                    state = f"step {now}: {len(engine.running)} run, {len(engine.waiting)} wait; {backend}"
                    progress.update(bar, completed=done, description=state)
    return Counter(run.backend for run in record)


def compare(model: Hybrid, requests: Sequence[Request], exact: Hybrid | None) -> tuple[bool, str]:
    """Run every request alone; return whether the engine gave the same, and a sentence."""
    others = [alone(model, request) for request in requests]
    if exact is None:
        pairs = list(zip(requests, others, strict=True))
        same = sum(r.output == o.output for r, o in pairs)
        sentence = f"{same} of {len(requests)} requests equal, token for token, to themselves alone"
        for i, (r, o) in enumerate(pairs):
            if r.output != o.output:
                first = next(n for n, (a, b) in enumerate(zip(r.output, o.output, strict=True)) if a != b)
                off = float((r.logits[first] - o.logits[first]).abs().max())
                at = f"request {i}, of {len(r.prompt)} tokens, differs first in token {first} of {r.new}"
                return False, f"{sentence}; {at}, where logits are off by {off:.2g}"
        return True, sentence
    truth = [alone(exact, request) for request in requests]

    def error(got: Sequence[Request]) -> float:
        pairs = zip(got, truth, strict=True)
        return max(float((torch.stack(g.logits) - torch.stack(t.logits)).abs().max()) for g, t in pairs)

    mine, budget = error(requests), 2 * error(others)
    return (
        mine <= budget,
        f"logits off by {mine:.3g} at most; the budget is {budget:.3g}, twice what they are off alone",
    )


def main(
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    slots: Annotated[int, typer.Option(min=1, help="How many may run at a time.")] = 16,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of a step at most.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 compares tokens, bfloat16 logits on given tokens.")] = "float32",
    backends: Annotated[str, typer.Option(help="The first and the second half's, or one; the best if empty.")] = "",
    pieces: Annotated[str, typer.Option(help="torch.compile backend of the pieces; default: inductor on a GPU.")] = "",
    seed: Annotated[int, typer.Option(help="Of weights and arrivals.")] = 0,
) -> None:
    """Serve requests with a hybrid model, and compare with running each alone."""
    console = Console(width=110, highlight=False)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(seed)
    forced = dtype != "float32"
    model = Hybrid(**SMALL).requires_grad_(False)
    exact = Hybrid(**SMALL).requires_grad_(False).double() if forced else None
    if exact is not None:  # the same weights, rounded alike
        model.to(getattr(torch, dtype))
        exact.load_state_dict(model.state_dict())
        exact.to(device)
    model.to(device)

    first, second = ((backends.split(",") if backends else backends_here(device)) * 2)[:2]
    work = new_requests(requests, seed=seed, length=SMALL["length"], forced=forced)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= budget]
    options = {"capture_sizes": sizes, "compile_piece": pieces or ("eager" if device.type == "cpu" else "inductor")}
    engine = Engine(model, slots=slots, budget=budget, **options)
    console.print(f"{requests} requests, {slots} slots, {dtype} on {device}; {first}, then {second}")
    start = time.perf_counter()
    launched = serve(engine, work, [first, second], SMALL["length"], console)
    seconds = time.perf_counter() - start
    assert engine.pool.num_free == slots

    runner, mixed = engine.runner, engine.mixed / engine.steps
    table = Table(show_header=False)
    table.add_row(
        "tokens", f"{sum(len(r.tokens) for r in work)} in {seconds:.1f} s, of which written: {sum(r.new for r in work)}"
    )
    table.add_row("steps", f"{engine.steps}, of which decodes beside prompts: {engine.mixed} ({mixed:.0%})")
    table.add_row("steps run as", ", ".join(f"{name}: {n}" for name, n in sorted(runner.steps.items())))
    pieces_of = " and ".join(str(len(graph)) for graph in runner.backend.graphs)
    layers = len(model.layers)
    table.add_row(
        "pieces", f"{pieces_of} in {len(runner.backend.graphs)} graphs (2 x {layers} layers + 1 = {2 * layers + 1})"
    )
    table.add_row("device graphs", f"{runner.recorded} recorded" if runner.recorded else "none on this device")
    table.add_row("launched from Python", ", ".join(f"{n} on {name}" for name, n in sorted(launched.items())))
    console.print(table)
    right, sentence = compare(model, work, exact)
    console.print(("OK: " if right else "FAILED: ") + sentence)
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
