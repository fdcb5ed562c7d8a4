"""Decode for Mamba-1 and Mamba-2: one step of the selective state space recurrence, or a few, for every row of a batch.

The state stays in the caller's cache; slot tables say which entry each row reads and which it writes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.checking import (
    floating,
    index_tensor,
    one_device,
    packed_rows,
    shape_is,
    short,
    slot_for_each,
    slot_table,
    tensor_rank,
)
from mamba_ops.ops.rounding import round_stochastically
from mamba_ops.ops.slots import padded_rows, store_rows, update_ends
from mamba_ops.registry import Sample, bad_argument, given


@mamba.op(mutates=("state", "out"))
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Advance the cached `state` of every row by the row's tokens, in place, and write the tokens' outputs.

    The tokens come in one of three layouts: `(n, ...)`, one token a row; `(n, length, ...)`, a few tokens a row; or
    packed `(tokens, ...)` with `cu_seqlens`. `...` is `(heads, dim)` for Mamba-2 and `(dim,)` for Mamba-1, whose
    tensors are those of one head without its dimension. Head h uses group h // (heads / groups) of B and C. Any
    strides, and any mix of float16, bfloat16, float32 and float64.

    Args:
        state: (slots, heads, dim, dstate), or (slots, dim, dstate) for Mamba-1; mutated, rounded once at each store.
        x: (..., heads, dim), or (..., dim) for Mamba-1.
        dt: (..., heads, dim), or (..., heads): one step size for a whole head. Mamba-1: (..., dim).
        A: (heads, dim, dstate), or (heads,); negative. Mamba-1: (dim, dstate).
        B, C: (..., groups, dstate), with heads a multiple of groups. Mamba-1: (..., dstate).
        D: skip weight, (heads, dim) or (heads,). Mamba-1: (dim,).
        z: gate, like x.
        dt_bias: added to dt, (heads, dim) or (heads,). Mamba-1: (dim,).
        dt_softplus: apply softplus to dt after the bias; linear above 20.
        slots: int32 or int64, (n,) or (n, columns), rows beyond n ignored: where row i's state is, in column 0. None:
            row i uses slot i, and no row is nobody.
        write_slots: the same for where the new state goes. None: where it came from. A null slot here means that the
            state is not stored.
        cu_seqlens: int32 or int64, (n + 1,): row i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. An empty row
            neither reads nor writes; tokens past the last row are left alone.
        num_accepted_tokens: int32 or int64, (n,), for speculative decoding; needs slots. Row i then starts from column
            max(num_accepted_tokens[i] - 1, 0) of its slots, the last one at most, and the state after its token t is
            stored in column t of its write_slots; beyond the columns nothing is stored. Otherwise the last state is
            stored in column 0.
        null_slot: a slot that means "nobody", as does any slot below 0. Such a row's output is zero, and nothing is
            read or stored for it.
        rounding_seed: one int64, () or (1,): a state of float16, which it must be, is rounded stochastically at each
            store, in any of the forms above. None: to the nearest.
        philox_rounds: rounds of the generator for that. 0: 10.
        out: like x, any float dtype; mutated.

    For every row, head and channel, in float32 at least, from the row's state s on:

        d = softplus(dt[t] + dt_bias)
        s = s * exp(A * d) + (B[t] * d) * x[t]
        out[t] = (sum(s * C[t]) + D * x[t]) * (z[t] * sigmoid(z[t]))

    The state is not rounded between the tokens of a row. No two rows may store to one slot, nor one row store to a slot
    that another reads.

    How an entry is rounded stochastically depends on the seed, on the slot that it is stored in and on its place there
    alone, as `round_stochastically` in mamba_ops/ops/rounding.py says exactly. That is the stream of torch and Triton;
    FlashInfer has another, of the slot that a row starts from.

    The reference keeps all rows padded to the longest and, given cu_seqlens, reads that length on the host.
    """
    output = given(out)
    compute = torch.promote_types(x.dtype, torch.float32)
    headless, flat = state.dim() == 3, x.dim() < state.dim()
    if cu_seqlens is not None:
        index, inside = padded_rows(cu_seqlens)
    else:
        index, inside = None, x.new_ones(x.shape[0], 1 if flat else x.shape[1], dtype=torch.bool)
    n, length = inside.shape
    if inside.numel() == 0:
        return output

    def rows(tokens: Tensor) -> Tensor:
        """An activation as (n, length, heads or groups, ...)."""
        tokens = tokens.unsqueeze(-2) if headless else tokens
        if index is not None:
            tokens = tokens[index]
        elif flat:
            tokens = tokens.unsqueeze(1)
        return tokens.to(compute)

    def weights(weight: Tensor) -> Tensor:
        """A per-head or per-channel parameter as (heads, 1 or dim, ...)."""
        weight = weight.unsqueeze(0) if headless else weight
        return (weight if weight.dim() > 1 else weight.unsqueeze(1)).to(compute)

    in_order = slots is None and write_slots is None and index is None  # row i has slot i, and every row has tokens
    source, live, target, stored = update_ends(
        slots, write_slots, null_slot, num_accepted_tokens, inside, None if in_order else state
    )

    u, d, b, c = rows(x), rows(dt), rows(B), rows(C)
    d = d if d.dim() == u.dim() else d.unsqueeze(-1)
    if dt_bias is not None:
        d = d + weights(dt_bias)
    if dt_softplus:  # not torch's softplus and sigmoid: on CPU their last bits depend on where an element stands
        d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
    d, b, c = d.unsqueeze(-1), b.unsqueeze(-2), c.unsqueeze(-2)  # (n, length, heads or groups, 1 or dim, 1 or dstate)
    b, c = (m.repeat_interleave(u.shape[2] // m.shape[2], dim=2) for m in (b, c))
    a = weights(A)
    a = a if a.dim() == 3 else a.unsqueeze(-1)

    def kept_in(slots: Tensor, s: Tensor) -> Tensor:
        """What is stored of a state."""
        return s if rounding_seed is None else round_stochastically(s, rounding_seed, slots, philox_rounds)

    cache = state.unsqueeze(1) if headless else state
    # Rows in order are a view: a cache of the dtype that is computed in then advances where it is.
    s = (cache[:n] if in_order else cache[torch.where(live, source, 0)]).to(compute)
    sums = []
    for t in range(length):
        decay, written = torch.exp(a * d[:, t]), (b[:, t] * d[:, t]) * u[:, t].unsqueeze(-1)
        if index is None:
            s = s.mul_(decay).add_(written)
        else:
            s = torch.where(inside[:, t].view(n, 1, 1, 1), s * decay + written, s)
        sums.append(torch.mul(s, c[:, t], out=written).sum(-1))
        if num_accepted_tokens is not None and t < target.shape[1]:
            store_rows(cache, target[:, t], kept_in(target[:, t], s), stored[:, t])
    if in_order and state.dtype != compute:
        cache[:n].copy_(kept_in(source, s))
    elif not in_order and num_accepted_tokens is None:
        store_rows(cache, target[:, 0], kept_in(target[:, 0], s), stored[:, 0])

    y = torch.stack(sums, dim=1)
    if D is not None:
        y = y + weights(D) * u
    if z is not None:
        gate = rows(z)
        y = y * (gate / (1 + torch.exp(-gate)))
    y = (y if in_order else torch.where(live.view(n, 1, 1, 1), y, 0)).to(output.dtype)
    if index is None:
        output.copy_(y.view(output.shape))
    else:
        store_rows(output, index.flatten(), y.view(-1, *output.shape[1:]), inside.flatten())
    return output


@selective_state_update.outputs
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@selective_state_update.checks
def _checks(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    rounding_seed: Tensor | None,
    philox_rounds: int,
    output: Tensor,
) -> None:
    floats = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    indices = {"slots": slots, "write_slots": write_slots, "cu_seqlens": cu_seqlens}
    floating(**floats, out=output)
    one_device(x.device, **floats, **indices, num_accepted_tokens=num_accepted_tokens, out=output)

    ranks = {3: "(slots, dim, dstate)", 4: "(slots, heads, dim, dstate)"}
    tensor_rank("state", state, ranks, hint="Mamba-1 has no heads dimension, Mamba-2 has one")
    if 0 in state.shape[1:]:
        raise bad_argument("state", got=f"shape {tuple(state.shape)}", expected="only slots of size 0")
    *heads, dim, dstate = state.shape[1:]
    channels, axes = ((*heads, dim), "heads, dim") if heads else ((dim,), "dim")

    packed_rows(cu_seqlens)
    ranks, hint = {len(channels) + 1: f"(tokens, {axes})"}, "with cu_seqlens, tokens are packed"
    if cu_seqlens is None:
        ranks[len(channels) + 2], hint = f"(n, length, {axes})", f"state has {'' if heads else 'no '}heads"
    tensor_rank("x", x, ranks, hint=hint)
    lead = tuple(x.shape[: -len(channels)])
    shape_is("x", x, (*lead, *channels), hint=f"{axes} are those of state")
    shape_is("z", z, tuple(x.shape), hint="z is like x")
    shape_is("out", output, tuple(x.shape), hint="out is like x")

    parameters = [channels, tuple(heads)] if heads else [channels]  # per channel or per head
    shape_is("dt", dt, *[(*lead, *shape) for shape in parameters], hint="tokens are those of x")
    shape_is("A", A, (*channels, dstate), *parameters[1:])
    shape_is("D", D, *parameters)
    shape_is("dt_bias", dt_bias, *parameters)
    groups = tuple(B.shape[-2:-1]) if heads else ()
    shape_is("B", B, (*lead, *groups, dstate), hint="tokens are those of x, dstate is that of state")
    shape_is("C", C, tuple(B.shape), hint="C is like B")
    if heads and (groups == (0,) or heads[0] % groups[0]):
        raise bad_argument("B", got=f"{groups[0]} groups", expected=f"a divisor of the {heads[0]} heads")

    one_device(x.device, rounding_seed=rounding_seed)
    if rounding_seed is not None:
        if rounding_seed.dtype != torch.int64:
            hint = "one number from torch.randint will do"
            raise bad_argument("rounding_seed", got=short(rounding_seed.dtype), expected="int64", hint=hint)
        shape_is("rounding_seed", rounding_seed, (1,), ())
        if state.dtype != torch.float16:
            hint = "rounding_seed asks for stochastic rounding, which is for states of float16"
            raise bad_argument("state", got=short(state.dtype), expected="float16", hint=hint)
    if philox_rounds < 0:
        raise bad_argument("philox_rounds", got=philox_rounds, expected="at least 1, or 0 for 10")

    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = 1
    if num_accepted_tokens is not None:
        index_tensor("num_accepted_tokens", num_accepted_tokens)
        shape_is("num_accepted_tokens", num_accepted_tokens, (n,), hint="one for each row")
        if slots is None:
            hint = "num_accepted_tokens says which of its columns a row starts from"
            raise bad_argument("slots", got="None", expected="a slot table", hint=hint)
        states = max((states, *lead[1:]))  # a state is stored after every token
    slot_table("slots", slots, rows=n, columns=states if write_slots is None else 1)
    slot_table("write_slots", write_slots, rows=n, columns=states)
    slot_for_each("state", state, slots, rows=n)


@selective_state_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    heads: int = 4,
    dim: int = 16,
    dstate: int = 16,
    groups: int = 2,
) -> Iterator[Sample]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(name: str, *lead: int, heads: int = heads, groups: int = groups, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three by default; heads = 0 is Mamba-1."""
        lead = lead or (3,)
        if heads:
            channels, per_head, group, a = [heads, dim], [heads], [groups], [heads]
        else:
            channels, per_head, group, a = inner, inner, [], [*inner, dstate]
        arguments = {
            "state": normal(8, *channels, dstate, dtype=state_dtype),
            "x": normal(*lead, *channels),
            "dt": normal(*lead, *per_head),
            "A": -normal(*a, dtype=torch.float32).exp(),
            "B": normal(*lead, *group, dstate),
            "C": normal(*lead, *group, dstate),
            "D": normal(*per_head, dtype=torch.float32),
            "dt_bias": normal(*per_head, dtype=torch.float32),
            "dt_softplus": True,
            "slots": indices(5, 1, 2),
        }
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("state", "x", "dt", "A", "B", "C")), arguments)

    channels = (heads, dim)
    inner = [heads * dim]  # the channels of Mamba-1
    per_channel: dict[str, Any] = {name: normal(*channels, dtype=torch.float32) for name in ("D", "dt_bias")}
    full_A = -normal(*channels, dstate, dtype=torch.float32).exp()
    columns = indices((5, 1, 2), (0, 3, 4), (7, 6, -1))

    yield sample("base")
    bare = sample("bare")
    yield Sample("no optionals", (*bare.args[:2], bare.args[2].abs(), *bare.args[3:]))
    positive: dict[str, Any] = {"dt": normal(3, heads).abs(), "dt_bias": normal(heads).abs()}
    yield sample("no softplus", **positive, dt_softplus=False)
    yield sample("dt above 20", dt=normal(3, heads) * 20)
    yield sample("per-channel dt", dt=normal(3, *channels))
    yield sample("per-channel D and bias", **per_channel)
    yield sample("full A", A=full_A)
    yield sample("nothing tied", A=full_A, dt=normal(3, *channels), **per_channel)
    yield sample("gate", z=normal(3, *channels))
    yield sample("one group", groups=1)
    yield sample("mamba1", heads=0)
    yield sample("mamba1 gate", heads=0, z=normal(3, *inner))
    yield sample("one head", heads=1, groups=1)

    yield sample("float16 state", state=normal(8, *channels, dstate, dtype=torch.float16))
    yield sample("bfloat16 state", state=normal(8, *channels, dstate, dtype=torch.bfloat16))
    yield sample("float32 output", out=normal(*channels, 3, dtype=torch.float32).permute(2, 0, 1))
    padded = normal(8, heads * dim * dstate + 24, dtype=state_dtype)
    yield sample("padded slots", state=padded[:, 8:-16].view(8, *channels, dstate))
    yield sample("transposed state", state=normal(8, heads, dstate, dim, dtype=state_dtype).transpose(2, 3))
    yield sample("transposed x", x=normal(heads, dim, 3).permute(2, 0, 1), out=normal(dim, heads, 3).transpose(0, 2))
    x, B, C = normal(3, heads * dim + 2 * groups * dstate).split([heads * dim, groups * dstate, groups * dstate], dim=1)
    B, C = B.unflatten(1, (groups, dstate)), C.unflatten(1, (groups, dstate))
    yield sample("views of a projection", x=x.unflatten(1, channels), B=B, C=C)

    yield sample("slot table", slots=columns, null_slot=-1)
    yield sample("int64 slots, more than rows", slots=indices(6, 3, 0, 1, 2, dtype=torch.int64))
    yield sample("no slots", slots=None, null_slot=0)
    yield sample("write slots", write_slots=indices(4, 1, 7))
    yield sample("write slots alone", slots=None, write_slots=indices(4, 1, 7))
    yield sample("null rows", slots=indices(-1, 3, -1))
    yield sample("null slot 0", slots=indices(5, 0, -7), null_slot=0)
    yield sample("all rows null", slots=indices(-1, -1, -1))
    yield sample("null destination", write_slots=indices(4, -1, 0), null_slot=0)

    yield sample("rows of two tokens", 3, 2, z=normal(3, 2, *channels))
    by_token: dict[str, Any] = {name: normal(2, 3, *channels).transpose(0, 1) for name in ("x", "z", "out")}
    yield sample("rows of two tokens, by token", 3, 2, **by_token)
    yield sample("packed", 7, cu_seqlens=indices(0, 2, 3, 7))
    yield sample("packed, empty and null rows", 5, cu_seqlens=indices(0, 0, 3, 3, 5), slots=indices(0, -1, 2, 4))
    yield sample("packed, tokens past the end", 7, cu_seqlens=indices(0, 1, 3, 4), out=normal(7, *channels))
    yield sample("packed mamba1", 7, heads=0, cu_seqlens=indices(0, 2, 3, 7, dtype=torch.int64))

    accepted: dict[str, Any] = {"num_accepted_tokens": indices(2, 0, 3), "slots": columns}
    yield sample("speculative", **accepted)
    yield sample("speculative rows", 3, 3, **accepted)
    yield sample("speculative packed", 6, cu_seqlens=indices(0, 3, 4, 6), **accepted)
    yield sample("speculative, more tokens than columns", 6, cu_seqlens=indices(0, 1, 1, 6), **accepted)
    half = normal(8, *channels, dstate, dtype=torch.float16)
    seed: dict[str, Any] = {"state": half, "rounding_seed": indices(0x123456789ABCDEF, dtype=torch.int64)}
    yield sample("stochastic rounding", **seed)
    rounded: dict[str, Any] = {**seed, **accepted, "rounding_seed": indices(-5, dtype=torch.int64)[0]}
    yield sample("stochastic rounding, speculative rows", 3, 3, **rounded, philox_rounds=7)
    yield sample("no rows", 0, slots=None)
    yield sample("one row", 1)
    yield sample(
        "everything",
        7,
        A=full_A,
        dt=normal(7, *channels),
        **per_channel,
        z=normal(7, *channels),
        slots=indices((5, 1), (0, 3), (7, 6)),
        write_slots=indices((2, 4, 1), (3, 0, 0), (7, -1, 0)),
        cu_seqlens=indices(0, 2, 3, 6),
        num_accepted_tokens=indices(2, 1, 9, dtype=torch.int64),
        null_slot=0,
        out=normal(7, *channels),
    )
