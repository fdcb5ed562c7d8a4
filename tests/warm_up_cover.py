"""Code for a child process of tests: warm a model up, then call it in all ways, at random, with no compiler."""

import random
from typing import Any

import torch
from torch import Tensor, nn

import mamba_ops
from mamba_ops import layers
from mamba_ops.layers.norms import RMSNorm
from mamba_ops.ops._triton import slices
from mamba_ops.serving import Plan

SLOTS = 12
HALF: dict[str, Any] = {"dtype": torch.bfloat16}
GDN: dict[str, Any] = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 16, "head_v_dim": 16}
MODELS: dict[str, Any] = {
    "tidy": lambda: [
        layers.Mamba2(64, heads=8, head_dim=16, dstate=16, groups=2, chunk_size=32, **HALF),
        layers.Mamba2(64, heads=8, head_dim=16, dstate=16, groups=2, chunk_size=32, **HALF),
        layers.Mamba(64, dstate=8, **HALF),
        layers.Mamba(48, dstate=8, norms="weighted", conv_bias=False, **HALF),
        layers.GatedDeltaNet(64, **GDN, **HALF),
        layers.GatedDeltaNet(64, **GDN, interleaved=False, **HALF),
        layers.ShortConv(64, **HALF),
        layers.KimiDeltaAttention(64, num_heads=2, head_dim=16, **HALF),
        layers.Mamba3(64, heads=4, head_dim=16, dstate=16, **HALF),
        RMSNorm(64, eps=1e-5, **HALF),
    ],
    "odd": lambda: [
        layers.Mamba2(40, heads=3, head_dim=10, dstate=6, groups=3, chunk_size=20, dt_min=0.1, dtype=torch.float16),
        layers.Mamba(36, dstate=7, dt_rank=3),
        layers.GatedDeltaNet(30, num_k_heads=1, num_v_heads=3, head_k_dim=9, head_v_dim=7),
        layers.ShortConv(36, d_conv=4, bias=True),
        layers.KimiDeltaAttention(30, num_heads=3, head_dim=9, lower_bound=-5.0),
        layers.Mamba3(30, heads=3, head_dim=10, dstate=6, is_mimo=True, mimo_rank=3),
    ],
}


def call_at_random(layer: Any, rng: random.Random) -> None:
    """Everything that may be done with a layer, each once, with random numbers of rows and tokens."""
    rows, length = rng.randint(1, 6), rng.choice([1, 2, 16, 64, 65, 100])
    if isinstance(layer, RMSNorm):
        size, first = layer.weight.shape[0], rng.choice([0, 0, 3])
        wide = torch.randn(rows, length, size + 8, dtype=layer.weight.dtype)
        layer(wide[..., first : first + size])
        layer(wide[:, 0, first : first + size])
        return
    weight = layer.out_proj.weight

    def hidden(*lead: int) -> Tensor:
        return torch.randn(*lead, weight.shape[0], dtype=weight.dtype)

    caches = layer.empty_caches(SLOTS)
    slots = torch.randperm(SLOTS)[:rows].int() if rng.random() < 0.5 else None
    known = torch.ones(rows, dtype=torch.bool) if rng.random() < 0.5 else None
    lengths = [rng.randint(0, 90) for _ in range(rows)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    layer(hidden(rows, length))
    layer(hidden(rows, length), *caches, slots=slots, has_initial_state=known)
    layer(hidden(sum(lengths) + 1), cu_seqlens=cu_seqlens)
    layer(hidden(sum(lengths) + 1), *caches, slots=slots, has_initial_state=known, cu_seqlens=cu_seqlens)
    layer.step(hidden(rows), *caches, slots=slots)
    layer.step(hidden(rows, rng.choice([1, 2, 3])), *caches, slots=slots)
    if not layer.takes_plans:
        return
    computed = [rng.choice([0, 5, 9]) for _ in range(rows)]
    new = [rng.choice([1, 1, 3, 70]) for _ in range(rows)]
    plan = Plan.of(computed, new, range(rows), max_requests=8)
    layer(hidden(plan.tokens + rng.randint(0, 3)), *caches, plan=plan)
    keep = [{c + n: SLOTS - 1} if n > 1 else None for c, n in zip(computed, new, strict=True)][:1]
    keep += [None] * (rows - 1)
    plan = Plan.of(computed, new, range(rows), keep=keep, rounds=2, max_requests=8)
    layer(hidden(plan.tokens), *caches, plan=plan)
    accepted = [2 if c and n < 3 else 0 for c, n in zip(computed, new, strict=True)]
    table = [[row, rows + row] for row in range(rows)]
    if all(n < 3 for n, a in zip(new, accepted, strict=True) if a):
        plan = Plan.of(computed, new, table, accepted=accepted, max_requests=8)
        layer(hidden(plan.tokens), *layer.empty_caches(SLOTS, columns=2), plan=plan)


def train_at_random(layer: Any, rng: random.Random) -> None:
    """A training step on rows of one length, in slices or not, and one on packed rows."""
    if isinstance(layer, RMSNorm):
        return
    slices.KEPT, slices.WALKS = rng.choice([(1, 1), (256 << 20, 256)])
    weight, rows, length = layer.out_proj.weight, rng.randint(1, 6), rng.choice([1, 2, 16, 64, 65, 100])
    lengths = [rng.randint(0, 90) for _ in range(rows)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.enable_grad():
        for lead, ends in (((rows, length), None), ((sum(lengths) + 1,), cu_seqlens)):
            hidden = torch.randn(*lead, weight.shape[0], dtype=weight.dtype, requires_grad=True)
            layer(hidden, cu_seqlens=ends).square().mean().backward()


def cover(name: str, *, steps: int, training: bool = False) -> dict[str, Any]:
    """Return the rows of the warm-up and what it compiled; raises if anything compiles after it."""
    rng = random.Random(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = nn.ModuleList(MODELS[name]())
    warmed = mamba_ops.warm_up(model, device="cpu", training=training)
    again = mamba_ops.warm_up(model, device="cpu", training=training)
    assert all(parameter.grad is None for parameter in model.parameters())
    with mamba_ops.no_jit():
        for layer in model:
            for _ in range(steps):
                (train_at_random if training else call_at_random)(layer, rng)
    return {
        "rows": warmed,
        "compiled": warmed.compiled,
        "variants": {kernel: count for kernel, count, _ in warmed.slowest},
        "skipped": warmed.skipped,
        "again": again.compiled,
        "again_cached": all(row.cached for row in again),
        "again_seconds": again.seconds,
    }
