"""Cached greedy decoding with Transformers' own cache: stock, ours, and ours with the backend swapped half way."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mamba_ops import record_selections, use_backend
from mamba_ops.commands.demo.copying import copying_backend
from mamba_ops.commands.demo.prefill import Progress
from mamba_ops.commands.targets import TargetError, quiet_transformers
from mamba_ops.commands.watch import watch_compiler
from mamba_ops.registry import backends, ops


@dataclass(frozen=True)
class Decoding:
    """One continuation of a prompt, token by token.

    Attributes:
        name: "stock, eager", "ours, eager", "ours, compiled" or "swapped half way".
        tokens: what was written.
        tokens_per_s: speed in the second half: after the steps that compile, and after the swap.
        graphs, recompiles: how many there have been until the end of this run.
        kernel_calls: how many runs of an op each backend took.
    """

    name: str
    tokens: tuple[int, ...]
    tokens_per_s: float
    graphs: int
    recompiles: int
    kernel_calls: Mapping[str, int]


def decode(
    model: Any, prompt: list[int], count: int, *, swap_to: str | None, progress: Progress, device: torch.device
) -> tuple[list[Decoding], str]:
    """Continue a prompt by `count` tokens in each of the four ways; return them, and the backend swapped to.

    It resets torch.compile. While it runs there is one backend more, called `copying`.

    Raises:
        TargetError: there is nothing to swap to.
        RegistryError: there is no such backend, or it refuses.
    """
    from mamba_ops.compat.transformers import use_mamba_ops

    tokens = torch.tensor([prompt], device=device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    runs: list[Decoding] = []
    with torch.no_grad(), quiet_transformers(), copying_backend(), watch_compiler() as watch:

        def run(name: str, step: Callable[..., Any], swap: str | None = None) -> None:
            progress(f"decoding: {name}")
            with record_selections() as record:
                written, speed = _greedy(model, step, tokens, count, swap)
            calls = Counter(selection.backend for selection in record)
            runs.append(Decoding(name, written, speed, watch.graphs, watch.recompiles, calls))

        run("stock, eager", model)
        with use_mamba_ops(model):
            other = _partner(swap_to, lambda: _greedy(model, model, tokens, 4, None), device)
            run("ours, eager", model)
            run("ours, compiled", compiled)
            run("swapped half way", compiled, other)
    return runs, other


def _greedy(
    model: Any, step: Callable[..., Any], prompt: Tensor, count: int, swap_to: str | None
) -> tuple[tuple[int, ...], float]:
    """Write `count` tokens, from the middle on with another backend, if one is named; return them and the tokens/s."""
    from mamba_ops.compat.transformers import cache_of

    out = model(prompt, use_cache=True)
    written = [out.logits[:, -1:].argmax(-1)]
    synchronize = torch.get_device_module(prompt.device).synchronize
    with ExitStack() as swapped:
        for i in range(count - 1):
            if swap_to is not None and i == count // 2:
                swapped.enter_context(use_backend(swap_to))
            out = step(written[-1], **cache_of(out), use_cache=True)
            written.append(out.logits[:, -1:].argmax(-1))
            if i == count // 2:
                synchronize()
                start = time.perf_counter()
        synchronize()
    speed = (count - 2 - count // 2) / (time.perf_counter() - start)
    return tuple(torch.cat(written, dim=1)[0].tolist()), speed


def _partner(name: str | None, step: Callable[[], object], device: torch.device) -> str:
    """Return the backend to swap to, after one step on it: so its refusal comes before anything is compiled."""
    decoding = ("causal_conv1d_update", "selective_state_update")
    with record_selections() as record:
        step()
    running = {s.backend for s in record if s.op.endswith(decoding)}
    needed = [op for op in ops().values() if op.name in decoding]
    others = [
        b.name
        for b in backends()
        if b.why_unusable(device.type) is None and b.name not in running and all(b.name in op.kernels for op in needed)
    ]
    if name is None and not others:
        raise TargetError(f"only {', '.join(running)} runs here, expected another backend to swap to")
    name = name.lower() if name else others[0]
    if running == {name}:
        raise TargetError(f"{name} runs here anyway, expected a backend to swap to: {', '.join(others)}")
    with use_backend(name):
        step()
    return name
