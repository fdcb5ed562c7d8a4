"""What `mamba-ops bench` times of the gated delta rule's ops and of KDA's, and fla's calls of both."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common import bench
from mamba_ops.ops._common.bench import LARGE, SMALL, TINY, Calls, Case
from mamba_ops.registry import Op

DELTA_RULE = {LARGE: (16, 32, 128), SMALL: (2, 4, 64), TINY: (2, 4, 16)}
"""Heads of keys, heads of values, channels of each. Large: Qwen3-Next; by channel, Kimi-Linear has 32 of both."""


def prefill_case(
    op: Op[...], lengths: tuple[int, ...], device: torch.device, *, by_channel: bool, scale: str | None = None
) -> Case:
    """The gated delta rule, or KDA, over packed sequences that go on from states."""
    heads, a, b, out = _tokens(sum(lengths), device, by_channel, scale)
    where = bench.packed(lengths, device, carried=True)
    arguments = heads | {
        "g": -0.1 * torch.nn.functional.softplus(a.float()),
        "beta": b.sigmoid(),
        **where,
        "qk_l2norm": True,
    }
    products = 6 * out.numel() * out.shape[-1]  # of keys, values and queries with the state
    name, caches = bench.of_tokens(sum(lengths), len(lengths)), _states(1 + len(lengths), out)
    return Case(op, name, arguments, caches, out, (where["slots"],), products=products)


def update_case(op: Op[...], rows: int, device: torch.device, *, by_channel: bool, scale: str | None = None) -> Case:
    """A decode step of the gated delta rule, or of KDA, the gates computed by the kernel; float32 states."""
    heads, a, b, out = _tokens(rows, device, by_channel, scale)
    slots, tables = bench.slot_tables(rows, 4 * out[0].numel() * out.shape[-1], device)
    arguments = heads | {
        "a": a,
        "b": b,
        "A_log": torch.rand(out.shape[1], device=device),
        "dt_bias": torch.randn(a.shape[1:], device=device) - 3,
        "slots": tables[0],
        "qk_l2norm": True,
    }
    return Case(op, bench.of_rows(rows), arguments, _states(slots, out), out, tables)


def _tokens(
    count: int, device: torch.device, by_channel: bool, scale: str | None
) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """Return q, k and v, views of one tensor as the convolution leaves them, the raw gates a and b, and an output."""
    k_heads, v_heads, dim = DELTA_RULE[scale or bench.scale_of(device)]
    k_heads = v_heads if by_channel else k_heads
    make, keys, values = partial(bench.random, device=device), k_heads * dim, v_heads * dim
    q, k, v = make(count, 2 * keys + values).split([keys, keys, values], dim=1)
    heads = {"q": q.unflatten(1, (k_heads, dim)), "k": k.unflatten(1, (k_heads, dim)), "v": v.unflatten(1, (-1, dim))}
    a, b = make(count, 2 * v_heads).chunk(2, dim=1)
    return heads, make(count, v_heads, dim) if by_channel else a, b, make(count, v_heads, dim)


def _states(slots: int, out: Tensor) -> dict[str, Tensor]:
    return {"ssm_state": torch.randn(slots, *out.shape[1:], out.shape[2], device=out.device)}


def fla(case: Case, module: Callable[[str], Any], *, of: str, name: str) -> Calls:
    """fla's kernel as its layers call it: once with a copy of our states, for errors, and once bare, for times.

    Its states are (k_dim, v_dim) and have no slots; q, k and v are made contiguous, and the gates of decode computed,
    before the clock starts.
    """
    function, given, many = getattr(module(of), name), case.arguments, name.startswith("chunk")
    options, axis = ({"cu_seqlens": given["cu_seqlens"].long()}, 0) if many else ({}, 1)
    if many:
        g, beta = given["g"], given["beta"]
    else:
        steps = torch.nn.functional.softplus(given["a"].float() + given["dt_bias"])
        g, beta = -given["A_log"].exp().view(-1, *[1] * (steps.dim() - 2)) * steps, given["b"].sigmoid()
    tensors = {"q": given["q"], "k": given["k"], "v": given["v"], "g": g, "beta": beta}
    options |= {name: tensor.contiguous().unsqueeze(axis) for name, tensor in tensors.items()}
    options |= {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    tables = [table for table in case.tables if table is not None]
    starts = {t.data_ptr(): case.cache[t.long()].mT.contiguous() for t in tables}  # as cold as slots are

    def checked(caches: Mapping[str, Tensor], slots: Tensor) -> Any:
        cache, rows = caches["ssm_state"], slots.long()
        out, last = function(initial_state=cache[rows].mT.contiguous(), **options)
        cache[rows] = last.mT.to(cache.dtype)
        return out.squeeze(axis)

    def timed(_: Mapping[str, Tensor], slots: Tensor) -> Any:
        return function(initial_state=starts[slots.data_ptr()], **options)[0]

    return Calls(checked, timed)
