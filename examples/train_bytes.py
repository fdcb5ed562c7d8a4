"""Train a language model on the bytes of any text: Mamba-2 and attention, documents packed, one compiled graph.

    python examples/train_bytes.py                      # two minutes on a CPU; needs mamba-ops[cli,plot]
    python examples/train_bytes.py *.md --family gdn    # a text of yours, with gated delta rule layers
    python examples/train_bytes.py --size large         # on a GPU, in bfloat16

It reads Python's own help by default, shows the loss and tokens a second, saves a checkpoint and a plot of the loss,
and then writes on from a prompt, token by token, with the trained layers' caches.
"""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.layers import GatedDeltaNet, Mamba, Mamba2

Family = Literal["mamba2", "mamba", "gdn"]
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 32, "pairs": 1, "tokens": 128},
    "small": {"hidden": 128, "pairs": 2, "tokens": 2048},
    "medium": {"hidden": 512, "pairs": 6, "tokens": 16384},
    "large": {"hidden": 1024, "pairs": 12, "tokens": 32768},
}
END = 0  # the byte after every document; a prompt begins with it too

# ---- the model -------------------------------------------------------------------------------------------------------


def recurrent(family: Family, hidden: int) -> Mamba | Mamba2 | GatedDeltaNet:
    """A recurrent layer with an inner width of twice the residual stream's."""
    if family == "mamba":
        return Mamba(hidden, dstate=16)
    if family == "gdn":
        heads = {"num_k_heads": hidden // 32, "num_v_heads": hidden // 16}
        return GatedDeltaNet(hidden, **heads, head_k_dim=32, head_v_dim=32)
    return Mamba2(hidden, heads=hidden // 16, head_dim=32, dstate=64, chunk_size=64)


class Attention(nn.Module):
    """Attention without positions: the recurrent layers tell the order."""

    def __init__(self, hidden: int, head_dim: int = 32) -> None:
        super().__init__()
        self.by_head = (3, hidden // head_dim, head_dim)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mix packed tokens (tokens, hidden); `mask` (tokens, tokens) says which see which."""
        q, k, v = self.qkv(x).unflatten(-1, self.by_head).permute(1, 2, 0, 3).unsqueeze(1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.out(y[0].transpose(0, 1).flatten(1)))

    def step(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        """Mix one token (1, hidden) with those seen so far, and add it to them."""
        q, k, v = self.qkv(x).unflatten(-1, self.by_head).permute(1, 2, 0, 3)
        seen[:] = [torch.cat((old, new), 1) for old, new in zip(seen, (k, v), strict=True)] if seen else [k, v]
        return cast(Tensor, self.out(functional.scaled_dot_product_attention(q, *seen).transpose(0, 1).flatten(1)))


class Bytes(nn.Module):
    """A language model of `pairs` of a recurrent and an attention layer."""

    def __init__(self, family: Family, hidden: int, pairs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, hidden)
        mixers = [m for _ in range(pairs) for m in (recurrent(family, hidden), Attention(hidden))]
        self.mixers, self.norms = nn.ModuleList(mixers), nn.ModuleList(nn.RMSNorm(hidden) for _ in mixers)
        self.head = nn.Sequential(nn.RMSNorm(hidden), nn.Linear(hidden, 256, bias=False))
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The logits after each of some packed tokens; no document sees another."""
        place = torch.arange(len(tokens), device=tokens.device)
        document = torch.searchsorted(cu_seqlens, place, right=True)
        mask = (document == document.unsqueeze(1)) & (place <= place.unsqueeze(1))
        x = self.embedding(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + (mixer(norm(x), mask) if isinstance(mixer, Attention) else mixer(norm(x), cu_seqlens=cu_seqlens))
        return cast(Tensor, self.head(x))

    def empty_caches(self) -> list[Any]:
        return [[] if isinstance(mixer, Attention) else mixer.empty_caches(1) for mixer in self.mixers]

    def step(self, token: Tensor, caches: list[Any]) -> Tensor:
        """The logits after the next token (1,) of one text."""
        x = self.embedding(token)
        for norm, mixer, cache in zip(self.norms, self.mixers, caches, strict=True):
            x = x + (mixer.step(norm(x), cache) if isinstance(mixer, Attention) else mixer.step(norm(x), *cache))
        return cast(Tensor, self.head(x))


@torch.no_grad()
def write(model: Bytes, prompt: str, length: int, temperature: float = 0.7) -> str:
    """Continue a text: every token goes through the layers' decode steps, with a cache each."""
    device = model.embedding.weight.device
    caches, read = model.empty_caches(), [END, *prompt.encode()]
    for place in range(len(prompt.encode()) + length):
        logits = model.step(torch.tensor(read[place : place + 1], device=device), caches)
        if place + 1 == len(read):
            read.append(int(torch.multinomial((logits[0].float() / temperature).softmax(0), 1)))
    return bytes(read[1:]).decode(errors="replace")


# ---- the training ----------------------------------------------------------------------------------------------------


def packed(documents: list[bytes], tokens: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield so many tokens and one more at a time, and where the documents among them begin and end."""
    stream, ends = bytearray(), [0]
    while True:
        while len(stream) <= tokens:
            stream += bytes([END]) + random.choice(documents)
            ends.append(len(stream))
        cu_seqlens = torch.tensor([end for end in ends if end < tokens] + [tokens], dtype=torch.int32, device=device)
        torch._dynamo.mark_dynamic(cu_seqlens, 0)  # their number varies
        yield torch.frombuffer(stream[: tokens + 1], dtype=torch.uint8).to(device, torch.long), cu_seqlens
        stream, ends = stream[tokens:], [0, *(end - tokens for end in ends if end > tokens)]


def train(model: Bytes, documents: list[bytes], tokens: int, steps: int, rate: float, console: Console) -> list[float]:
    """Train in place and return the losses, in nats a byte."""
    device = model.embedding.weight.device
    batches = packed(documents, tokens, device)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * n / steps))
    )

    @torch.compile(fullgraph=True)
    def loss_of(text: Tensor, cu_seqlens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits = model(text[:-1], cu_seqlens)
        return functional.cross_entropy(logits.float(), text[1:])

    losses: list[float] = []
    bar = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"), TimeRemainingColumn())
    with Progress(TextColumn("training"), *bar, console=console) as progress:
        task, start = progress.add_task("", total=steps, now="compiling"), 0.0
        for n in range(steps):
            loss = loss_of(*next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            start = start or time.perf_counter()  # the first step compiled
            speed = n * tokens / (time.perf_counter() - start) if n else 0
            progress.update(task, advance=1, now=f"loss {losses[-1]:.3f}  {speed:,.0f} tokens/s")
    return losses


def plot(losses: list[float], path: Path) -> None:
    """Draw the loss of every step, and its mean over the last few."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    last = max(1, len(losses) // 25)
    means = torch.tensor(losses).unfold(0, last, 1).mean(1)
    axes.plot(losses, color="0.8", label="each step")
    axes.plot(range(last - 1, len(losses)), means, label=f"mean of {last} steps")
    axes.set(xlabel="step", ylabel="loss, nats a byte")
    axes.legend()
    figure.savefig(path)


def main(
    text: Annotated[list[Path] | None, typer.Argument(help="Files, each a document. None: Python's help.")] = None,
    family: Annotated[Family, typer.Option(help="The recurrent layers.")] = "mamba2",
    size: Annotated[Literal["tiny", "small", "medium", "large"], typer.Option(help="Of the model.")] = "small",
    steps: int = 200,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 3e-3,
    prompt: str = "The ",
    length: Annotated[int, typer.Option(help="Bytes to write.")] = 300,
    checkpoint: Path = Path("train_bytes.pt"),
) -> None:
    console = Console()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    torch.manual_seed(0)
    random.seed(0)
    documents = [path.read_bytes() for path in text] if text else [topic.encode() for topic in topics.values()]
    tokens, sizes = SIZES[size]["tokens"], {name: SIZES[size][name] for name in ("hidden", "pairs")}
    model = Bytes(family, **sizes).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{parameters:,} parameters, {family} and attention, on {device}; {sum(map(len, documents)):,} bytes of text"
    )
    losses = train(model, documents, tokens, steps, rate, console)
    torch.save({"family": family, "sizes": sizes, "model": model.state_dict(), "losses": losses}, checkpoint)

    saved = torch.load(checkpoint, map_location=device)
    model = Bytes(saved["family"], **saved["sizes"]).to(device)
    model.load_state_dict(saved["model"])
    console.print(write(model, prompt, length), markup=False, highlight=False)
    try:
        plot(losses, image := checkpoint.with_suffix(".png"))
    except ImportError:
        console.print("no plot: it needs mamba-ops[plot]", markup=False)
    else:
        console.print(f"{checkpoint}, {image}")


if __name__ == "__main__":
    typer.run(main)
