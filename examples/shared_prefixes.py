"""An engine that reads what requests have in common once, and guesses several tokens at a time.

Requests that begin alike go on from one state; a request may branch; a small model drafts tokens, which the large one
checks in one step, and rejected ones are rolled back. Every request gets what it would get alone, token for token. Run
it with `python examples/shared_prefixes.py`; `--help` lists its options.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from mamba_ops import use_backend
from mamba_ops.layers import GatedDeltaNet, KimiDeltaAttention, Mamba, Mamba2, Mamba3, ShortConv
from mamba_ops.serving import NoFreeSlot, PiecewiseRunner, Plan, PrefixCache, StatePool

VOCABULARY = 256


class Model(nn.Module):
    """A byte model: an embedding, one layer of each kind that is asked for, a head. Its caches are in `pool`."""

    pool: StatePool

    def __init__(self, kinds: str = "mamba mamba2 gdn kda mamba3 short_conv", hidden: int = 32) -> None:
        super().__init__()
        made: dict[str, Callable[[], Any]] = {
            "mamba": lambda: Mamba(hidden, d_inner=hidden, dstate=8, dt_rank=4),
            "mamba2": lambda: Mamba2(hidden, heads=2, head_dim=hidden // 2, dstate=8, chunk_size=8),
            "gdn": lambda: GatedDeltaNet(hidden, num_k_heads=2, num_v_heads=2, head_k_dim=8, head_v_dim=hidden // 2),
            "kda": lambda: KimiDeltaAttention(hidden, num_heads=2, head_dim=hidden // 2),
            "mamba3": lambda: Mamba3(hidden, heads=2, head_dim=hidden // 2, dstate=8, chunk_size=8, is_mimo=True),
            "short_conv": lambda: ShortConv(hidden),
        }
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleDict({kind: made[kind]() for kind in kinds.split()})
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def new_pool(self, slots: int, *, columns: int = 1) -> StatePool:
        """Caches for so many slots, as exact as the weights."""
        dtype = self.head.weight.dtype
        self.pool = StatePool.of(dict(self.layers.items()), slots, columns=columns, dtype=dtype, state_dtype=dtype)
        return self.pool

    def first(self, count: int) -> "Model":
        """A small model to draft with: the first layers, between the same embedding and head."""
        small = Model("")
        small.embedding, small.head = self.embedding, self.head
        small.layers = nn.ModuleDict(list(self.layers.items())[:count])
        return small

    def forward(self, tokens: Tensor, plan: Plan | None = None) -> Tensor:
        """The logits after each of a step's tokens; without a plan, of one text."""
        hidden = self.embedding(tokens)
        for name, layer in self.layers.items():
            if plan is None:
                hidden = hidden + layer(hidden.unsqueeze(0)).squeeze(0)
            else:
                hidden = hidden + layer(hidden, *self.pool.caches[name], plan=plan)
        return cast(Tensor, self.head(hidden))


@dataclass(eq=False)
class Request:
    """A text to continue by `new` tokens.

    Attributes:
        tokens: the prompt, then what was written.
        computed: how many of them its states have seen.
        reading: how many there are to read before the next is written: the prompt; all, after its slots were taken.
        accepted: how many tokens of its latest decode were kept; None while it reads.
        slots: of its states; none while it waits.
        found: how many tokens it did not have to read, because a state was known.
    """

    tokens: list[int]
    new: int
    computed: int = 0
    reading: int = 0
    accepted: int | None = None
    source: int | None = None
    slots: list[int] = field(default_factory=list)
    found: int = 0

    def __post_init__(self) -> None:
        self.reading, self.end = len(self.tokens), len(self.tokens) + self.new

    @property
    def done(self) -> bool:
        return len(self.tokens) >= self.end


class Engine:
    """Runs requests in steps. Those that write have one token in a step, and what `draft` guesses after it; those that
    read have a part of their prompt, as far as the step's budget goes.

    Attributes:
        pool, prefixes: the states of requests, and of beginnings that several may share.
        waiting, running: requests without slots, and with them.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 64,
        most_running: int = 8,
        budget: int = 128,
        block_size: int = 16,
        drafts: int = 3,
        rounds: int = 4,
        draft: Callable[[Request, int], list[int]] = lambda request, most: [],
        run: Callable[[Plan, Tensor], Tensor] | None = None,
    ) -> None:
        """`run` runs a step, such as a `PiecewiseRunner`; None: the model itself."""
        self.device, self.columns = model.head.weight.device, 1 + drafts
        self.pool = model.new_pool(slots, columns=self.columns)
        self.prefixes = PrefixCache(self.pool, block_size)
        self.budget, self.rounds, self.most_running, self.draft = budget, rounds, most_running, draft
        self.max_requests = rounds * most_running
        self.run = run or (lambda plan, tokens: model(tokens, plan))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.steps = self.guessed = self.kept = self.read = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def branch(self, request: Request, token: int, new: int) -> Request | None:
        """Return a request that goes on from one that writes, with another next token; None if there are no slots."""
        if (
            request.accepted is None
            or len(self.running) >= self.most_running
            or not self._give_slots(other := Request([*request.tokens[: request.computed], token], new))
        ):
            return None
        self.pool.copy(request.slots, other.slots[0], accepted=request.accepted)
        other.computed = other.reading = request.computed
        other.accepted = 1
        self.running.append(other)
        return other

    def take_slots(self, request: Request) -> None:
        """Let a running request wait. It reads its tokens again later, from the latest state of them that is known."""
        self.running.remove(request)
        self._stop(request)
        self.waiting.insert(0, request)

    def step(self) -> None:
        """Advance the running requests. After an exception those of the step read all of their tokens again."""
        while self.waiting and len(self.running) < self.most_running and self._give_slots(self.waiting[0]):
            self.running.append(self.waiting.pop(0))
        batch: list[Request] = []
        new: list[int] = []
        read: list[list[int]] = []
        keep: list[dict[int, int]] = []
        rows, left = self.max_requests - len(self.running), self.budget
        for request in sorted(self.running, key=lambda r: r.accepted is None):  # those that write go first
            if not left:
                break
            if request.accepted is not None:
                most = min(self.columns - 1, left - 1, request.end - len(request.tokens) - 1)
                tokens = [request.tokens[-1], *self.draft(request, most)]
            else:
                if request.computed == 0:  # in the step that reads it, for a state may be evicted before
                    request.computed, request.source = self.prefixes.find(request.tokens)
                    request.found += request.computed
                tokens = request.tokens[request.computed : request.computed + left]
            kept: dict[int, int] = {}
            if request.accepted is None and (most := min(self.rounds - 1, rows)) > 0:
                kept = self.prefixes.keep(request.tokens, request.computed, request.computed + len(tokens), most=most)
            batch.append(request)
            new.append(len(tokens))
            read.append(tokens)
            keep.append(kept)
            left, rows = left - len(tokens), rows - len(kept)
        plan = Plan.of(
            [r.computed for r in batch],
            new,
            [r.slots for r in batch],
            accepted=[r.accepted for r in batch] if self.columns > 1 else None,
            prompt_tokens=[r.reading for r in batch],
            sources=[r.source for r in batch],
            keep=keep,
            rounds=self.rounds,
            max_requests=self.max_requests,
            device=self.device,
        )
        texts = [[*r.tokens[: r.computed], *part] for r, part in zip(batch, read, strict=True)]
        flat = [token for p in plan.pieces for token in texts[p.request][p.start : p.stop]]
        try:
            logits = self.run(plan, torch.tensor(flat, dtype=torch.int64, device=self.device))
            choices = logits.argmax(-1).tolist()
        except Exception:
            self.prefixes.discard()
            for request in batch:  # some caches may be ahead of others
                self.take_slots(request)
            raise
        self.prefixes.commit()
        self.steps, self.read = self.steps + 1, self.read + len(flat)
        last = plan.last_tokens
        for i, request in enumerate(batch):
            self._write(
                request,
                read[i],
                choices[last[i] + 1 - new[i] : last[i] + 1] if request.accepted else choices[last[i] : last[i] + 1],
            )

    def _write(self, request: Request, read: list[int], choices: list[int]) -> None:
        """Take the model's choices: after each token of a decode, after the last one of a prompt."""
        request.source = None
        if request.accepted is None:
            request.computed += len(read)
            if request.computed < len(request.tokens):
                return
            request.tokens.append(choices[0])
            request.accepted = 1
        else:
            guesses, right = read[1:], 0
            while right < len(guesses) and guesses[right] == choices[right]:
                right += 1
            self.guessed, self.kept = self.guessed + len(guesses), self.kept + right
            request.tokens += choices[: right + 1]
            request.computed += right + 1
            request.accepted = right + 1
        if request.done:
            self.running.remove(request)
            self._stop(request)

    def _give_slots(self, request: Request) -> bool:
        """Give a request a slot for each token that it may have in a decode, or none if there are too few."""
        try:
            for _ in range(self.columns):
                request.slots.append(self.prefixes.allocate())
        except NoFreeSlot:
            self._stop(request)
            return False
        return True

    def _stop(self, request: Request) -> None:
        for slot in request.slots:
            self.pool.free(slot)
        request.slots, request.accepted, request.source, request.computed = [], None, None, 0
        request.reading = len(request.tokens)


class Drafter:
    """Guesses the next tokens of requests with a small model, one after the other, from states of its own."""

    def __init__(self, model: Model, requests: int) -> None:
        self.model, self.pool = model, model.new_pool(2 * requests)
        self.seen: dict[Request, tuple[int, list[int]]] = {}

    def __call__(self, request: Request, most: int) -> list[int]:
        """Read what the request has written since, and guess up to `most` tokens, in a copy of the state."""
        for other in [r for r in self.seen if r.done]:
            for slot in self.seen.pop(other)[1]:
                self.pool.free(slot)
        if most <= 0:
            return []
        seen, slots = self.seen.get(request) or (0, [self.pool.allocate(), self.pool.allocate()])
        guesses = [self._read(request.tokens[seen:], seen, slots[0])]
        self.seen[request] = len(request.tokens), slots
        self.pool.copy(*slots)
        while len(guesses) < most:
            guesses.append(self._read(guesses[-1:], len(request.tokens) + len(guesses) - 1, slots[1]))
        return guesses

    def _read(self, tokens: list[int], before: int, slot: int) -> int:
        device = self.model.head.weight.device
        plan = Plan.of([before], [len(tokens)], [slot], max_requests=1, device=device)
        with torch.no_grad():
            return int(self.model(torch.tensor(tokens, device=device), plan)[-1].argmax())


def alone(model: Model, request: Request) -> list[int]:
    """What the model chooses after each token of a text, read by itself: without engine, plan or caches."""
    with torch.no_grad():
        return cast(list[int], model(torch.tensor(request.tokens, device=model.head.weight.device)).argmax(-1).tolist())


def is_as_alone(model: Model, request: Request, prompt: int) -> bool:
    """Whether every token after the prompt is what the model chooses when it reads the request by itself."""
    return alone(model, request)[prompt - 1 : -1] == request.tokens[prompt:]


def new_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of which many begin alike, as with a system prompt or earlier turns of a conversation."""
    text, rng = list((Path(__file__).resolve().parents[1] / "LICENSE").read_bytes()), random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        shared = rng.choice(prompts)[: rng.randint(20, 80)] if prompts and rng.random() < 0.8 else text[:40]
        begin = rng.randrange(len(text) - 60)
        prompts.append([*shared, *text[begin : begin + rng.randint(2, 60)]])
    return prompts


def main(
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 24,
    drafts: Annotated[int, typer.Option(min=0, help="Tokens that the small model guesses in a step, at most.")] = 3,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
) -> None:
    """Serve requests that begin alike, with speculation, and compare with running each alone."""
    console, device = Console(width=110, highlight=False), torch.accelerator.current_accelerator(check_available=True)
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    model = Model().requires_grad_(False).to(device, torch.float64)
    runner = PiecewiseRunner(
        model,
        max_tokens=128,
        max_requests=32,
        columns=1 + drafts,
        speculative=drafts > 0,
        shared=True,
        rounds=4,
        device=device,
        compile_piece="eager" if device.type == "cpu" else "inductor",
    )
    engine = Engine(model, drafts=drafts, draft=Drafter(model.first(3), 9), run=runner)
    prompts = new_prompts(requests, seed)
    work = [Request(list(prompt), 12) for prompt in prompts]
    for request in work:
        engine.add(request)
    start = time.perf_counter()
    columns = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")]
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=requests)
        while engine.waiting or engine.running:
            engine.step()
            progress.update(bar, completed=sum(r.done for r in work), description=f"step {engine.steps}")
    seconds, total = time.perf_counter() - start, sum(map(len, prompts))
    console.print(f"{requests} requests in {engine.steps} steps and {seconds:.1f} s on {device}")
    console.print(f"of {total} tokens of prompts {sum(r.found for r in work)} were not read: their states were known")
    console.print(f"of {engine.guessed} guesses {engine.kept} were right; {len(runner.backend.graphs)} graphs")
    same = sum(is_as_alone(model, r, len(p)) for r, p in zip(work, prompts, strict=True))
    console.print(f"{'OK' if same == requests else 'FAILED'}: {same} of {requests} requests equal to themselves alone")
    if same < requests:
        raise SystemExit(1)


if __name__ == "__main__":
    with use_backend("torch"):  # states are in float64, so that equal means equal; other kernels leave that to torch
        typer.run(main)
