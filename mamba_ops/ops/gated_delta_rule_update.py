"""Decode with the gated delta rule: one step of the recurrence, or a few, for every row of a batch.

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
    slot_for_each,
    slot_table,
    tensor_rank,
)
from mamba_ops.ops.slots import padded_rows, store_rows, update_ends
from mamba_ops.registry import Sample, bad_argument, given

EPS = 1e-6  # added to the sum of squares where q and k are normalised


@mamba.op(mutates=("state", "out"))
def gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Advance the cached `state` of every row by the row's tokens, in place, and write the tokens' outputs.

    The tokens come in one of three layouts: `(n, ...)`, one token a row; `(n, length, ...)`, a few tokens a row; or
    packed `(tokens, ...)` with `cu_seqlens`. Head h of v, of the state and of the gates uses head
    h // (v_heads / k_heads) of q and k. Any strides, and any mix of float16, bfloat16, float32 and float64. How a state
    decays and how much of a value is written is either given as `g` and `beta`, or computed from `a`, `b`, `A_log` and
    `dt_bias`.

    Args:
        state: (slots, v_heads, v_dim, k_dim); mutated, rounded once at each store.
        q, k: (..., k_heads, k_dim).
        v: (..., v_heads, v_dim), with v_heads a multiple of k_heads.
        g: (..., v_heads), the log of the decay; at most 0.
        beta: (..., v_heads), 0 to 1, or to 2 where eigenvalues may be negative.
        a, b: (..., v_heads): instead of g and beta.
        A_log, dt_bias: (v_heads,), with a and b.
        scale: of q. None: k_dim ** -0.5.
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
        qk_l2norm: divide every head of q and k by its length: by sqrt(sum(x^2) + 1e-6).
        null_slot: a slot that means "nobody", as does any slot below 0. Such a row's output is zero, and nothing is
            read or stored for it.
        out: like v, any float dtype; mutated.

    For every row and head, in float32 at least, from the row's state S on:

        g = -exp(A_log) * softplus(a[t] + dt_bias)            where it is not given; softplus is linear above 20
        beta = sigmoid(b[t])
        S = S * exp(g)
        S = S + beta * (v[t] - S k[t]) k[t]^T
        out[t] = S (scale * q[t])

    The state is not rounded between the tokens of a row. No two rows may store to one slot, nor one row store to a slot
    that another reads.

    The reference keeps all rows padded to the longest and, given cu_seqlens, reads that length on the host. The
    recurrence is that of "Gated Delta Networks: Improving Mamba2 with Delta Rule" (Yang, Kautz and Hatamizadeh).
    """
    output = given(out)
    compute = torch.promote_types(q.dtype, torch.float32)
    flat = v.dim() < state.dim()
    if cu_seqlens is not None:
        index, inside = padded_rows(cu_seqlens)
    else:
        index, inside = None, v.new_ones(v.shape[0], 1 if flat else v.shape[1], dtype=torch.bool)
    n, length = inside.shape
    if inside.numel() == 0:
        return output

    def rows(tokens: Tensor) -> Tensor:
        """An activation as (n, length, heads, ...)."""
        if index is not None:
            tokens = tokens[index]
        elif flat:
            tokens = tokens.unsqueeze(1)
        return tokens.to(compute)

    in_order = slots is None and write_slots is None and index is None  # row i has slot i, and every row has tokens
    source, live, target, stored = update_ends(
        slots, write_slots, null_slot, num_accepted_tokens, inside, None if in_order else state
    )

    queries, keys, values = rows(q), rows(k), rows(v)
    if qk_l2norm:
        queries, keys = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) for x in (queries, keys))
    queries = queries * (q.shape[-1] ** -0.5 if scale is None else scale)
    if g is not None and beta is not None:
        decay, much = rows(g), rows(beta)
    elif a is not None and b is not None and A_log is not None and dt_bias is not None:
        decay, much = delta_rule_gates(rows(a), rows(b), A_log, dt_bias)
    decay = torch.exp(decay)

    k_heads, of_one = q.shape[-2], v.shape[-2] // q.shape[-2]
    # Rows in order are a view: a state of the dtype that is computed in then advances where it is.
    s = (state[:n] if in_order else state[torch.where(live, source, 0)]).to(compute).unflatten(1, (k_heads, of_one))
    y = torch.empty_like(values)
    for t in range(length):
        here = inside[:, t] & live
        key, query = (x[:, t, :, None, :, None] for x in (keys, queries))
        by = decay[:, t].view(n, k_heads, of_one, 1, 1)
        new = s * by if index is not None else s.mul_(by)
        wrong = values[:, t].view(n, k_heads, of_one, -1, 1) - new @ key
        new += much[:, t].view(n, k_heads, of_one, 1, 1) * wrong * key.transpose(-1, -2)
        y[:, t] = torch.where(here.view(n, 1, 1), (new @ query).view_as(y[:, t]), 0)
        s = new if index is None else torch.where(here.view(n, 1, 1, 1, 1), new, s)
        if num_accepted_tokens is not None and t < target.shape[1]:
            store_rows(state, target[:, t], s.flatten(1, 2), stored[:, t])
    if in_order and state.dtype != compute:
        state[:n].copy_(s.flatten(1, 2))
    elif not in_order and num_accepted_tokens is None:
        store_rows(state, target[:, 0], s.flatten(1, 2), stored[:, 0])

    if index is not None:
        store_rows(output, index.flatten(), y.flatten(0, 1), inside.flatten())
    else:
        output.copy_(y[:, 0] if flat else y)
    return output


def delta_rule_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and beta, like `a`, from what a layer projects, in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    d = a.to(wide) + dt_bias.to(wide)
    # not torch's softplus and sigmoid: on a CPU their last bits depend on where an element stands
    d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
    return -torch.exp(A_log.to(wide)) * d, 1 / (1 + torch.exp(-b.to(wide)))


@gated_delta_rule_update.outputs
def _output(v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@gated_delta_rule_update.checks
def _checks(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    output: Tensor,
) -> None:
    given_gates = {"g": g, "beta": beta}
    raw_gates = {"a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias}
    floats = {"q": q, "k": k, "v": v, **given_gates, **raw_gates}
    indices = {"slots": slots, "write_slots": write_slots, "cu_seqlens": cu_seqlens}
    indices["num_accepted_tokens"] = num_accepted_tokens
    floating(state=state, **floats, out=output)
    one_device(v.device, "v", state=state, **floats, **indices, out=output)

    wanted, others = (raw_gates, given_gates) if g is None and beta is None else (given_gates, raw_gates)
    names = f"{' and '.join(given_gates)}, or {', '.join(raw_gates)}"
    for name, tensor in wanted.items():
        if tensor is None:
            raise bad_argument(name, got="none", expected=f"a tensor: either {names} are given")
    for name, tensor in others.items():
        if tensor is not None:
            raise bad_argument(name, got="a tensor", expected=f"none: either {names} are given")

    tensor_rank("state", state, {4: "(slots, v_heads, v_dim, k_dim)"})
    _, v_heads, v_dim, k_dim = state.shape
    packed_rows(cu_seqlens)
    if cu_seqlens is None:
        tensor_rank("v", v, {3: "(n, v_heads, v_dim)", 4: "(n, length, v_heads, v_dim)"})
    else:
        tensor_rank("v", v, {3: "(tokens, v_heads, v_dim)"}, hint="with cu_seqlens, tokens are packed")
    lead = tuple(v.shape[:-2])
    shape_is("v", v, (*lead, v_heads, v_dim), hint="heads and v_dim are state's")
    delta_rule_tokens(q, k, lead, v_heads, k_dim)
    for name, tensor in {**given_gates, "a": a, "b": b}.items():
        shape_is(name, tensor, (*lead, v_heads), hint="one number a token and head of v")
    for name in ("A_log", "dt_bias"):
        shape_is(name, raw_gates[name], (v_heads,), hint="one number a head of v")
    shape_is("out", output, tuple(v.shape), hint="out is like v")

    n = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slot_table("slots", slots, rows=n)
    slot_table("write_slots", write_slots, rows=n)
    slot_for_each("state", state, slots, rows=n)
    if num_accepted_tokens is not None:
        index_tensor("num_accepted_tokens", num_accepted_tokens)
        shape_is("num_accepted_tokens", num_accepted_tokens, (n,), hint="one for each row")
        if slots is None:
            raise bad_argument("slots", got="none", expected="a table", hint="num_accepted_tokens picks its column")


def delta_rule_tokens(q: Tensor, k: Tensor, lead: tuple[int, ...], v_heads: int, k_dim: int) -> None:
    """Raise unless q and k have the tokens `lead` and heads that `v_heads` heads can share."""
    tensor_rank("q", q, {len(lead) + 2: "(..., k_heads, k_dim), with the tokens of v"})
    k_heads = q.shape[-2]
    shape_is("q", q, (*lead, k_heads, k_dim), hint="tokens are those of v")
    shape_is("k", k, tuple(q.shape), hint="k is like q")
    if k_heads == 0 or v_heads % k_heads:
        raise bad_argument("q", got=f"{k_heads} heads", expected=f"a divisor of the {v_heads} heads of v")


@gated_delta_rule_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.float32,
    k_heads: int = 2,
    v_heads: int = 4,
    k_dim: int = 16,
    v_dim: int = 24,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change a few things each."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def indices(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def sample(name: str, *lead: int, k_heads: int = k_heads, raw: bool = True, **changes: Any) -> Sample:
        """A call with tokens of shape `lead`, three rows of one by default; q, k, v are parts of one tensor."""
        lead = lead or (3,)
        keys, values = k_heads * k_dim, v_heads * v_dim
        q, k, v = normal(*lead, 2 * keys + values).split([keys, keys, values], dim=-1)
        arguments = {
            "state": normal(9, v_heads, v_dim, k_dim, dtype=state_dtype),
            "q": q.unflatten(-1, (k_heads, k_dim)),
            "k": k.unflatten(-1, (k_heads, k_dim)),
            "v": v.unflatten(-1, (v_heads, v_dim)),
            "slots": indices(5, 1, 2),
            "qk_l2norm": True,
        }
        if raw:
            gate = {"a": normal(*lead, v_heads), "b": normal(*lead, v_heads)}
            weights = {n: normal(v_heads, dtype=torch.float32) for n in ("A_log", "dt_bias")}
            arguments |= {**gate, **weights}
        else:
            g, beta = -normal(*lead, v_heads, dtype=torch.float32).abs(), 2 * normal(*lead, v_heads).sigmoid()
            arguments |= {"g": g, "beta": beta}
        arguments |= changes
        return Sample(name, tuple(arguments.pop(key) for key in ("state", "q", "k", "v")), arguments)

    packed: dict[str, Any] = {"cu_seqlens": indices(0, 2, 2, 5)}
    table = indices((1, 2, 3), (4, 5, 6), (-1, 7, 0), dtype=torch.int64)
    wide = normal(9, v_heads * v_dim * k_dim + 16, dtype=state_dtype)[:, 8:-8].view(9, v_heads, v_dim, k_dim)
    turned = normal(9, v_heads, k_dim, v_dim, dtype=state_dtype).transpose(2, 3)
    yield sample("base")
    yield sample("gates given", raw=False, slots=None, null_slot=0, k_heads=1, scale=0.3)
    zero = normal(3, k_heads, k_dim) * indices(0, 1, 1).view(3, 1, 1).to(dtype)
    yield sample("a few tokens, padded slots, a zero q", 3, 2, state=wide, q=zero[:, None].expand(-1, 2, -1, -1))
    short = {"raw": False, "beta": normal(3, v_heads).sigmoid(), "k": normal(3, k_heads, k_dim) / k_dim**0.5}
    yield sample("not normalised, turned state", state=turned, qk_l2norm=False, **short)
    moved: dict[str, Any] = {"slots": indices(-1, 0, 3), "write_slots": indices(6, 4, 7), "null_slot": 7}
    yield sample("null rows, write slots", **moved)
    v, out = (normal(v_heads, v_dim, 7, dtype=d).permute(2, 0, 1) for d in (dtype, torch.float32))
    yield sample("packed, empty row", 7, **packed, write_slots=indices(5, 7, 2), v=v, out=out)
    a = normal(6, v_heads) * 30
    speculative: dict[str, Any] = {"cu_seqlens": indices(0, 3, 5, 6), "num_accepted_tokens": indices(2, 1, 5)}
    yield sample("speculative", 6, a=a, b=-a, slots=table.abs(), null_slot=0, **speculative)
    written: dict[str, Any] = {"slots": table[:, :2], "write_slots": table.flip(1), "k_heads": v_heads}
    yield sample("speculative, write slots", 3, 2, num_accepted_tokens=indices(0, 2, 1), **written)
