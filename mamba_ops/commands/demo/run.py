"""The demo: Transformers' own Mamba-2, stock against ours, on a real text; `run_demo` returns its results as data."""

import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import torch

from mamba_ops.commands.demo.decode import Decoding, decode
from mamba_ops.commands.demo.prefill import Job, Prefill, Progress, measure_in_child
from mamba_ops.commands.targets import PROMPTS, TargetError, quiet_transformers, tokenize, transformers_model
from mamba_ops.commands.watch import device_name

TOLERANCE = 1e-4  # of the largest logit; sums in another order change a logit by about 1e-6 of it
PROMPT, WRITTEN = 300, 64  # tokens: what decoding goes on from, and how many it adds


@dataclass(frozen=True)
class DemoReport:
    """The results of the demo.

    Attributes:
        model: a description of the model.
        device: the name of the device.
        stock, ours: prompts of several lengths, read without a cache.
        decoding: a prompt continued with a cache, in four ways; stock's comes first.
        swap_to: the backend that the last of them changed to in the middle.
    """

    model: str
    device: str
    stock: Prefill
    ours: Prefill
    decoding: tuple[Decoding, ...]
    swap_to: str

    @property
    def problems(self) -> list[str]:
        """A sentence for each result that is not as expected."""
        found = []
        tolerance = TOLERANCE * self.ours.largest_logit
        if not self.ours.difference <= tolerance:  # NaN is wrong too
            found.append(f"ours: a logit is {self.ours.difference:.2g} off, expected at most {tolerance:.2g}")
        if (self.ours.graphs, self.ours.compiles) != (1, 1):
            found.append(f"ours: {self.ours.graphs} graphs in {self.ours.compiles} compiles, expected 1 in 1")
        stock, last = self.decoding[0], self.decoding[-1]
        for run in self.decoding[1:]:
            same = sum(a == b for a, b in zip(run.tokens, stock.tokens, strict=True))
            if same < len(stock.tokens):
                found.append(f"{run.name}: {same} of {len(stock.tokens)} tokens are those of stock, expected all")
        if (last.graphs, last.recompiles) != (1, 0):
            found.append(f"decoding: {last.graphs} graphs and {last.recompiles} recompiles, expected 1 and none")
        if self.swap_to not in last.kernel_calls or len(last.kernel_calls) == 1:
            found.append(f"{last.name}: ran on {', '.join(last.kernel_calls)}, expected two, {self.swap_to} the second")
        return found


def run_demo(
    text: bytes,
    *,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    swap_to: str | None = None,
    layers: int | None = None,
    cap: float = 60.0,
    prompts: tuple[int, ...] = PROMPTS,
    progress: Progress = lambda step: None,
) -> DemoReport:
    """Read a text with Transformers' Mamba-2, stock and ours, and continue it with the backend swapped half way.

    Both compile with `dynamic=True`, each in a process of its own, into an empty cache that ours fills first.

    Args:
        text: what is read; bytes are tokens, unless the checkpoint has a tokenizer.
        checkpoint: a folder. None: a small model with random weights.
        device: where to run.
        swap_to: the backend to change to; None: the next in the default order.
        layers: of a model with random weights; 2 by default.
        cap: stock is stopped that many seconds after its first compiled call began.
        prompts: how many tokens to read, one length after the other.
        progress: called with each step that begins.

    Raises:
        TargetError: no transformers, no such checkpoint, too short a text, or nothing to swap to.
        RegistryError: there is no such backend, or it refuses.
        MeasurementError: a child process failed.
    """
    device = torch.device(device)
    what = str(checkpoint) if checkpoint else "mamba2"
    progress("loading the model")
    with quiet_transformers():
        model = transformers_model(what, device, layers=layers)
        tokens = tokenize(text, what)
    described = describe(model)
    if len(tokens) < max(prompts):
        raise TargetError(f"got a text of {len(tokens)} tokens, expected at least {max(prompts)}")
    decoding, other = decode(
        model, tokens[: min(PROMPT, len(tokens))], WRITTEN, swap_to=swap_to, progress=progress, device=device
    )
    del model
    job = Job(what, [tokens[:length] for length in prompts], str(device), ours=True, layers=layers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ours = measure_in_child(job, progress, cache=Path(folder))
        stock = measure_in_child(replace(job, ours=False), progress, cache=Path(folder), cap=cap)
    return DemoReport(described, device_name(device), stock, ours, tuple(decoding), other)


def describe(model: Any) -> str:
    """Return what a report calls a Mamba-2 model of Transformers."""
    config = model.config
    if getattr(config, "model_type", "") != "mamba2":
        raise TargetError(f"got a checkpoint of {getattr(config, 'model_type', 'unknown type')}, expected mamba2")
    weights = sum(p.numel() for p in model.parameters())
    sizes = f"{config.num_hidden_layers} layers of width {config.hidden_size}, {weights / 1e6:.1f} M weights"
    return f"transformers {version('transformers')}, {type(model).__name__}: {sizes}, float32"


def read_text(path: Path | None = None) -> bytes:
    """Return the bytes of a file, or else of this project's README: the checkout's or the installed package's."""
    checkout = Path(__file__).parents[3]
    if path is None and (checkout / "pyproject.toml").is_file():
        path = checkout / "README.md"
    if path is not None:
        return path.read_bytes()
    try:
        return str(metadata("mamba-ops").json.get("description", "")).encode()
    except PackageNotFoundError:
        raise TargetError(
            "got no text, expected the README of a checkout or an installed package; name a file"
        ) from None
