"""What is measured: calls of every op, of the sizes of large models' layers, laid out as those lay them out."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mamba_ops.commands.bench.case import Case, packed, slot_tables, spread
from mamba_ops.commands.bench.clocks import nbytes, random

LARGE, SMALL, TINY = "large", "small", "tiny"
"""Layers of the largest models; what a CPU takes milliseconds for; what Triton's interpreter runs in seconds."""
MAMBA1 = {LARGE: (8192, 16, 256), SMALL: (512, 16, 16), TINY: (16, 16, 8)}
"""Channels, size of the state, rank of the steps. Large: Falcon-Mamba 7B."""
MAMBA2 = {LARGE: (128, 64, 128, 8, 256), SMALL: (16, 32, 64, 1, 64), TINY: (4, 16, 16, 2, 16)}
"""Heads, channels of each, size of the state, groups, chunk. Large: Codestral Mamba 7B."""
CHANNELS = {LARGE: 10240, SMALL: 640, TINY: 48}
"""Of the convolution of the same layer."""
DELTA_RULE = {LARGE: (16, 32, 128), SMALL: (2, 4, 64), TINY: (2, 4, 16)}
"""Heads of keys, heads of values, channels of each. Large: Qwen3-Next; by channel, Kimi-Linear has 32 of both."""
MAMBA3 = {LARGE: (64, 64, 128, 1, 32), SMALL: (8, 32, 64, 1, 16), TINY: (4, 16, 16, 2, 4)}
"""Heads, channels of each, size of the state, groups, angles. Large: a layer of width 2048."""
MAMBA3_CHUNK, WIDTH = 64, 4


def scale_of(device: torch.device) -> str:
    """Return the scale at which benchmarks of Triton kernels run: on a CPU these are interpreted."""
    return TINY if device.type == "cpu" else LARGE


# ---- whole sequences -------------------------------------------------------------------------------------------------


def chunk_scan(
    tokens: int, sequences: int, device: torch.device, *, carried: bool = False, scale: str | None = None
) -> Case:
    """The scan of a Mamba-2 layer; x, B and C are views of one tensor, as the convolution leaves them."""
    heads, dim, dstate, groups, chunk_size = MAMBA2[scale or scale_of(device)]
    make = partial(random, device=device)
    x, B, C = make(tokens, heads * dim + 2 * groups * dstate).split([heads * dim, *2 * [groups * dstate]], dim=1)
    out, cache = make(tokens, heads, dim), make(1 + sequences, heads, dim, dstate)
    tensors = {
        "x": x.unflatten(1, (heads, dim)),
        "dt": make(tokens, heads),
        "A": -1 - 15 * torch.rand(heads, device=device),
        "B": B.unflatten(1, (groups, dstate)),
        "C": C.unflatten(1, (groups, dstate)),
        "D": make(heads),
        "dt_bias": make(heads) - 3,
        **packed(spread(tokens, sequences), device),
    }
    moved = nbytes(*tensors.values(), out) + (1 + carried) * nbytes(cache[1:])
    options = {"chunk_size": chunk_size, "dt_softplus": True, "has_initial_state": _carried(sequences, carried, device)}
    return Case(
        "mamba_chunk_scan",
        _name(tokens, sequences) + (", initial states" if carried else ""),
        tensors | options,
        {"ssm_state": cache},
        out,
        moved,
        (tensors["slots"],),
        products=4 * tokens * heads * dim * dstate,  # into the state, and out of it
    )


def conv(
    tokens: int,
    sequences: int,
    device: torch.device,
    *,
    carried: bool = False,
    contiguous: bool = False,
    scale: str | None = None,
) -> Case:
    """The convolution of the same layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, make = CHANNELS[scale or scale_of(device)], partial(random, device=device)
    out = make(tokens, dim)
    shape = (1 + sequences, dim, WIDTH - 1) if contiguous else (1 + sequences, WIDTH - 1, dim)
    cache = make(*shape) if contiguous else make(*shape).transpose(1, 2)
    tensors = {
        "x": make(tokens, dim),
        "weight": make(dim, WIDTH),
        "bias": make(dim),
        **packed(spread(tokens, sequences), device),
    }
    moved = nbytes(*tensors.values(), out) + (1 + carried) * nbytes(cache[1:])
    options = {"has_initial_state": _carried(sequences, carried, device)}
    name = _name(tokens, sequences) + (", initial states" if carried else "")
    name += ", contiguous state" if contiguous else ""
    return Case("causal_conv1d", name, tensors | options, {"conv_state": cache}, out, moved, (tensors["slots"],))


def scan(lengths: tuple[int, ...], device: torch.device, *, dim: int | None = None, scale: str | None = None) -> Case:
    """The scan of a Mamba-1 layer from no state; x and z, and B and C, are views of one tensor each, as the projections
    are."""
    channels, dstate, rank = MAMBA1[scale or scale_of(device)]
    dim = dim or channels
    tokens, make = sum(lengths), partial(random, device=device)
    x, z = make(tokens, 2 * dim).split(dim, dim=1)
    _, B, C = make(tokens, rank + 2 * dstate).split([rank, dstate, dstate], dim=1)
    out = make(tokens, dim)
    cache = torch.randn(1 + len(lengths), dim, dstate, device=device)
    tensors = {
        "x": x,
        "dt": make(tokens, dim),
        "A": -1 - 15 * torch.rand(dim, dstate, device=device),
        "B": B,
        "C": C,
        "D": torch.randn(dim, device=device),
        "z": z,
        "dt_bias": torch.randn(dim, device=device) - 3,
        **packed(lengths, device),
    }
    moved = nbytes(*tensors.values(), out, cache[1:])
    name = _name(tokens, len(lengths)) + (f", {dim} channels" if dim != channels else "")
    return Case(
        "selective_scan",
        name,
        tensors | {"dt_softplus": True},
        {"ssm_state": cache},
        out,
        moved,
        (tensors["slots"],),
        exponentials=tokens * dim * dstate,
    )


def channel_major(case: Case) -> Case:
    """Return a case on the same numbers with a channel's tokens contiguous."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    arguments = {n: moved(v) if n in ("x", "dt", "z", "B", "C") else v for n, v in case.arguments.items()}
    return replace(case, name=f"{case.name}, channel-major", arguments=arguments, out=moved(case.out))


def delta_rule(
    lengths: tuple[int, ...], device: torch.device, *, by_channel: bool = False, scale: str | None = None
) -> Case:
    """The gated delta rule, or KDA, over packed sequences that go on from states."""
    heads, a, b, out = _delta_rule_tokens(sum(lengths), device, by_channel, scale)
    rows, cache = len(lengths), _delta_rule_states(len(lengths), out)
    tensors = heads | {
        "g": -0.1 * torch.nn.functional.softplus(a.float()),
        "beta": b.sigmoid(),
        **packed(lengths, device),
        "has_initial_state": torch.ones(rows, dtype=torch.bool, device=device),
    }
    moved = nbytes(*tensors.values(), out) + 2 * nbytes(cache[1:])
    return Case(
        "chunk_kda" if by_channel else "chunk_gated_delta_rule",
        _name(sum(lengths), rows),
        tensors | {"qk_l2norm": True},
        {"ssm_state": cache},
        out,
        moved,
        (tensors["slots"],),
        products=6 * out.numel() * out.shape[-1],  # of keys, values and queries with the state
    )


# ---- one token for every row -----------------------------------------------------------------------------------------


def state_update(
    version: int, state_dtype: torch.dtype, rows: int, device: torch.device, *, scale: str | None = None
) -> Case:
    """One decode step of a Mamba-2 layer (A, dt, D tied over a head's channels) or of a gated Mamba-1 layer."""
    scale = scale or scale_of(device)
    shapes: tuple[tuple[int, ...], ...]
    if version == 2:
        heads, dim, dstate, groups, _ = MAMBA2[scale]
        shapes = (heads, dim), (heads,), (heads,), (groups, dstate)
    else:
        dim, dstate, _ = MAMBA1[scale]
        shapes = (dim,), (dim,), (dim, dstate), (dstate,)
    x_shape, dt_shape, A_shape, B_shape = shapes
    make = partial(random, device=device)
    slots, tables = slot_tables(rows, math.prod(x_shape) * dstate * state_dtype.itemsize, device)
    tensors = {
        "x": make(rows, *x_shape),
        "dt": make(rows, *dt_shape),
        "A": -1 - 15 * torch.rand(A_shape, device=device),
        "B": make(rows, *B_shape),
        "C": make(rows, *B_shape),
        "D": make(*dt_shape),
        "dt_bias": make(*dt_shape) - 3,
        **({"z": make(rows, *x_shape)} if version == 1 else {}),
        "slots": tables[0],
    }
    state = torch.randn(slots, *x_shape, dstate, device=device, dtype=state_dtype)
    out = torch.empty_like(tensors["x"])
    return Case(
        "selective_state_update",
        f"Mamba-{version}, {_rows(rows)}, {str(state_dtype).removeprefix('torch.')} state",
        tensors | {"dt_softplus": True},
        {"ssm_state": state},
        out,
        nbytes(*tensors.values(), out) + 2 * rows * nbytes(state[0]),
        tables,
    )


def conv_update(rows: int, device: torch.device, *, scale: str | None = None) -> Case:
    """The convolution of the same layer. Its state is a transposed view, channels contiguous, as engines keep it."""
    dim, make = CHANNELS[scale or scale_of(device)], partial(random, device=device)
    x = make(rows, dim)
    slots, tables = slot_tables(rows, dim * (WIDTH - 1) * x.element_size(), device)
    tensors = {"x": x, "weight": make(dim, WIDTH), "bias": make(dim), "slots": tables[0]}
    state, out = make(slots, WIDTH - 1, dim).transpose(1, 2), torch.empty_like(x)
    moved = nbytes(*tensors.values(), out) + 2 * rows * nbytes(state[0])
    return Case("causal_conv1d_update", _rows(rows), tensors, {"conv_state": state}, out, moved, tables)


def delta_rule_update(rows: int, device: torch.device, *, by_channel: bool = False, scale: str | None = None) -> Case:
    """A decode step of the gated delta rule, or of KDA, the gates computed by the kernel; float32 states."""
    heads, a, b, out = _delta_rule_tokens(rows, device, by_channel, scale)
    slots, tables = slot_tables(rows, 4 * out[0].numel() * out.shape[-1], device)
    cache = _delta_rule_states(slots - 1, out)
    tensors = heads | {
        "a": a,
        "b": b,
        "A_log": torch.rand(out.shape[1], device=device),
        "dt_bias": torch.randn(a.shape[1:], device=device) - 3,
        "slots": tables[0],
    }
    moved = nbytes(*tensors.values(), out) + 2 * rows * nbytes(cache[0])
    op = "kda_update" if by_channel else "gated_delta_rule_update"
    return Case(op, _rows(rows), tensors | {"qk_l2norm": True}, {"ssm_state": cache}, out, moved, tables)


def mamba3(lengths: tuple[int, ...], device: torch.device, *, scale: str | None = None) -> Case:
    """Mamba-3's scan over packed sequences that go on from states."""
    tensors, caches, out = _mamba3(sum(lengths), 1 + len(lengths), device, scale)
    options: dict[str, Any] = {"chunk_size": MAMBA3_CHUNK, **packed(lengths, device)}
    options["has_initial_state"] = torch.ones(len(lengths), dtype=torch.bool, device=device)
    moved = nbytes(*tensors.values(), out) + 2 * sum(nbytes(cache[1:]) for cache in caches.values())
    products = 4 * out.numel() * caches["ssm_state"].shape[-1]
    name = _name(sum(lengths), len(lengths))
    tables = (options["slots"],)
    return Case("mamba3_chunk_scan", name, tensors | options, caches, out, moved, tables, products=products)


def mamba3_update(rows: int, device: torch.device, *, scale: str | None = None) -> Case:
    """A decode step of Mamba-3; float32 states."""
    heads, dim, dstate, *_ = MAMBA3[scale or scale_of(device)]
    slots, tables = slot_tables(rows, 4 * heads * dim * dstate, device)
    tensors, caches, out = _mamba3(rows, slots, device, scale)
    moved = nbytes(*tensors.values(), out) + 2 * rows * sum(nbytes(cache[0]) for cache in caches.values())
    given = tensors | {"slots": tables[0]}
    return Case("mamba3_state_update", _rows(rows), given, caches, out, moved, tables)


def _mamba3(
    tokens: int, slots: int, device: torch.device, scale: str | None
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    heads, dim, dstate, groups, angles = MAMBA3[scale or scale_of(device)]
    make = partial(random, device=device)
    tensors = {
        "x": make(tokens, heads, dim),
        "dt": make(tokens, heads).sigmoid(),
        "A": -make(tokens, heads).float().exp(),
        "trap": make(tokens, heads),
        "angles": make(tokens, angles),
        "B": make(tokens, groups, dstate),
        "C": make(tokens, groups, dstate),
        "D": torch.randn(heads, device=device),
        "B_bias": torch.randn(heads, dstate, device=device),
        "C_bias": torch.randn(heads, dstate, device=device),
    }
    caches = {
        "angle_state": 6 * torch.rand(slots, heads, angles, device=device),
        "ssm_state": torch.randn(slots, heads, dim, dstate, device=device),
        "k_state": make(slots, heads, dstate),
        "v_state": make(slots, heads, dim),
    }
    return tensors, caches, make(tokens, heads, dim)


def _delta_rule_tokens(
    count: int, device: torch.device, by_channel: bool, scale: str | None
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Return q, k and v, views of one tensor as the convolution leaves them, the raw gates a and b, and an output."""
    k_heads, v_heads, dim = DELTA_RULE[scale or scale_of(device)]
    k_heads = v_heads if by_channel else k_heads
    make, keys, values = partial(random, device=device), k_heads * dim, v_heads * dim
    q, k, v = make(count, 2 * keys + values).split([keys, keys, values], dim=1)
    heads = {"q": q.unflatten(1, (k_heads, dim)), "k": k.unflatten(1, (k_heads, dim)), "v": v.unflatten(1, (-1, dim))}
    a, b = make(count, 2 * v_heads).chunk(2, dim=1)
    return heads, make(count, v_heads, dim) if by_channel else a, b, make(count, v_heads, dim)


def _delta_rule_states(rows: int, out: Tensor) -> Tensor:
    return torch.randn(1 + rows, *out.shape[1:], out.shape[2], device=out.device)


def _carried(sequences: int, carried: bool, device: torch.device) -> Tensor | None:
    return torch.ones(sequences, dtype=torch.bool, device=device) if carried else None


def _name(tokens: int, sequences: int) -> str:
    return f"{tokens} tokens" + (f", {sequences} sequences" if sequences > 1 else "")


def _rows(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"
