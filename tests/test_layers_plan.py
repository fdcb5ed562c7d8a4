"""Layers on mixed batches: whatever an engine's steps look like, every request gets what it would get alone."""

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamba_ops
from mamba_ops.layers import (
    FalconH1Mamba2,
    GatedDeltaNet,
    KimiDeltaAttention,
    Mamba,
    Mamba2,
    Mamba3,
    OlmoGatedDeltaNet,
    ShortConv,
    ZambaMamba,
)
from mamba_ops.registry import Backend, use_backend
from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR

DEVICE = ACCELERATOR or torch.device("cpu")
HIDDEN = 16
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: Mamba(HIDDEN, d_inner=24, dstate=8, dt_rank=3),
    "mamba, norms": lambda: Mamba(HIDDEN, d_inner=24, dstate=8, dt_rank=3, norms="weighted"),
    "gdn": lambda: GatedDeltaNet(HIDDEN, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4),
    "gdn, flat": lambda: GatedDeltaNet(
        HIDDEN, num_k_heads=2, num_v_heads=2, head_k_dim=8, head_v_dim=4, interleaved=False
    ),
    "kda": lambda: KimiDeltaAttention(HIDDEN, num_heads=2, head_dim=8),
    "kda, bounded": lambda: KimiDeltaAttention(HIDDEN, num_heads=2, head_dim=4, low_rank=False, lower_bound=-5.0),
    "mamba2": lambda: Mamba2(HIDDEN, heads=4, head_dim=8, dstate=8, groups=2, chunk_size=8),
    "short_conv": lambda: ShortConv(HIDDEN),
    "mamba3": lambda: Mamba3(HIDDEN, heads=4, head_dim=8, dstate=8, groups=2, chunk_size=8),
    "mamba3, mimo": lambda: Mamba3(
        HIDDEN, heads=2, head_dim=4, dstate=8, chunk_size=4, is_mimo=True, mimo_rank=2, out_norm=True
    ),
    "mamba2, dt limited": lambda: Mamba2(HIDDEN, heads=2, head_dim=4, dstate=8, chunk_size=8, dt_min=0.01, dt_max=0.1),
    "mamba2, multiplied": lambda: FalconH1Mamba2(
        HIDDEN, heads=4, head_dim=8, dstate=8, chunk_size=8, multipliers=(0.9, 1.2, 0.6, 1.4, 0.8), with_norm=False
    ),
    "gdn, separate": lambda: OlmoGatedDeltaNet(
        HIDDEN, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4, allow_neg_eigval=False
    ),
}


@pytest.fixture(autouse=True)
def _exact() -> Any:
    with torch.no_grad(), use_backend("torch"):  # the references are exact in float64
        yield


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request: pytest.FixtureRequest) -> Any:
    layer = request.param().to(DEVICE, torch.float64)
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.1)
    return layer


def caches_of(layer: Any, slots: int, columns: int = 1) -> list[Tensor]:
    """Caches full of NaN: a read of what was not written shows."""
    return [cache.fill_(torch.nan) for cache in layer.empty_caches(slots, state_dtype=torch.float64, columns=columns)]


@pytest.mark.parametrize("seed", range(4))
def test_every_request_is_as_if_alone(layer: Any, seed: int) -> None:
    """Prompts come in chunks, decodes beside them; requests come and go, and slots are used again."""
    rng = random.Random(seed)
    requests = [torch.randn(rng.randint(1, 40), HIDDEN, device=DEVICE, dtype=torch.float64) for _ in range(12)]
    caches, free, running, waiting = caches_of(layer, 5), list(range(5)), {}, list(range(12))
    done: dict[int, list[Tensor]] = {i: [] for i in waiting}
    mixed = 0
    while waiting or running:
        while waiting and free and rng.random() < 0.6:
            running[waiting.pop()] = free.pop(rng.randrange(len(free)))
        ids = [i for i in running if rng.random() < 0.9]
        computed = [sum(len(part) for part in done[i]) for i in ids]
        new = [min(rng.choice((1, 1, 2, 9, 30)), len(requests[i]) - c) for i, c in zip(ids, computed, strict=True)]
        plan = Plan.of(computed, new, [running[i] for i in ids], max_requests=6, device=DEVICE)
        parts = [requests[ids[k]][computed[k] : computed[k] + new[k]] for k in plan.order]
        padding = torch.full((rng.randint(0, 3), HIDDEN), torch.nan, device=DEVICE, dtype=torch.float64)
        output = layer(torch.cat([*parts, padding]), *caches, plan=plan)[: plan.tokens]
        for k, part in zip(plan.order, output.split([new[k] for k in plan.order]), strict=True):
            done[ids[k]].append(part)
        assert plan.tensors.counts is not None
        mixed += all(plan.tensors.counts[::2].tolist())
        for i in [i for i in running if sum(len(part) for part in done[i]) == len(requests[i])]:
            free.append(running.pop(i))
    assert mixed > 3
    for i, request in enumerate(requests):
        torch.testing.assert_close(torch.cat(done[i]), layer(request.unsqueeze(0))[0], rtol=1e-9, atol=1e-9)


def test_speculative_tokens_that_are_not_kept_leave_no_trace(layer: Any) -> None:
    """Three tokens a step, of which the first one, two or three are right; the others are noise."""
    rng = random.Random(0)
    texts = [torch.randn(30, HIDDEN, device=DEVICE, dtype=torch.float64) for _ in range(3)]
    caches, slots = caches_of(layer, 10, columns=3), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    kept, accepted = [0, 0, 0], [0, 0, 0]
    outputs: list[list[Tensor]] = [[], [], []]
    while min(kept) < 27:
        ids = [i for i in range(3) if kept[i] < 27]
        new = [3 if accepted[i] else 5 + i for i in ids]
        right = [rng.randint(1, 3) if accepted[i] else 5 + i for i in ids]
        plan = Plan.of(
            [kept[i] for i in ids],
            new,
            [slots[i] for i in ids],
            accepted=[accepted[i] for i in ids],
            max_requests=3,
            device=DEVICE,
        )
        parts = []
        for k in plan.order:
            text = texts[ids[k]][kept[ids[k]] :][: right[k]]
            parts.append(torch.cat([text, torch.randn(new[k] - len(text), HIDDEN).to(text)]))
        output = layer(torch.cat(parts), *caches, plan=plan)
        for k, part in zip(plan.order, output.split([new[k] for k in plan.order]), strict=True):
            outputs[ids[k]].append(part[: right[k]])
            accepted[ids[k]] = right[k] if accepted[ids[k]] else 1
            kept[ids[k]] += right[k]
    for text, parts in zip(texts, outputs, strict=True):
        got = torch.cat(parts)
        torch.testing.assert_close(got, layer(text.unsqueeze(0))[0, : len(got)], rtol=1e-9, atol=1e-9)


def test_a_plan_of_zeros_mixes_nothing_and_touches_nothing(layer: Any) -> None:
    caches = caches_of(layer, 2)
    hidden = torch.randn(7, HIDDEN, device=DEVICE, dtype=torch.float64)
    got = layer(hidden, *caches, plan=Plan.zeros(7, device=DEVICE))
    assert torch.equal(got, torch.zeros_like(got))
    assert all(cache.isnan().all() for cache in caches)


def test_a_plan_needs_caches(layer: Any) -> None:
    with pytest.raises(ValueError, match=r"plan: got a plan without caches, expected \w+ caches?; see empty_caches"):
        layer(torch.randn(7, HIDDEN), plan=Plan.zeros(7))


def test_a_backend_is_asked_about_what_it_will_be_given() -> None:
    """Not about a slice of the projection, whose rows start anywhere."""
    layer: Any = Mamba2(HIDDEN, heads=3, head_dim=8, dstate=8).to(DEVICE)
    op, picky = mamba_ops.selective_state_update, Backend("picky", devices=None, priority=-10)
    kernel = op.kernels["torch"].function

    def run(*args: Any, **kwargs: Any) -> None:
        kernel(*args, **kwargs)

    run.__signature__ = inspect.signature(kernel)  # type: ignore[attr-defined]
    picky.implements(op, unsupported_layout=lambda x: f"got strides {x.stride()}" if x.stride(0) * 4 % 16 else None)(
        run
    )
    try:
        with use_backend("picky"):
            layer(
                torch.randn(2, HIDDEN, device=DEVICE),
                *layer.empty_caches(2),
                plan=Plan.of([1, 1], [1, 1], [0, 1], device=DEVICE),
            )
    finally:
        picky.remove()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int16])
def test_a_layer_without_a_mixing_op_says_so(state_dtype: torch.dtype) -> None:
    zamba = ZambaMamba(HIDDEN, heads=2, d_inner=32, dstate=4, dt_rank=1)
    doubled = OlmoGatedDeltaNet(HIDDEN, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=4, allow_neg_eigval=True)
    for layer in (zamba, doubled):
        caches = layer.empty_caches(2, state_dtype=state_dtype)
        with pytest.raises(ValueError, match=rf"^{type(layer).__name__}: plan: got a plan.*, expected None: .*mixing"):
            layer(torch.zeros(3, HIDDEN), *caches, plan=Plan.of([0], [3], [1], max_requests=2))
