"""causal_conv1d_update: the depthwise convolution of a decode step, over a cache of each row's last inputs."""

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
    slot_table,
    tensor_rank,
)
from mamba_ops.ops.slots import is_null, row_slots, slot_columns, store_rows
from mamba_ops.registry import Sample, bad_argument, given


@mamba.op(mutates=("conv_state", "out"))
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve each row's new tokens with the inputs before them, write `out`, and advance `conv_state` in place.

    Args:
        x: one token a row `(n, dim)`, a few `(n, length, dim)`, or packed `(tokens, dim)` with `cu_seqlens`.
        conv_state: `(slots, dim, state_len)`, state_len >= width - 1; column 0 is the oldest input. Mutated.
        weight: `(dim, width)`, width 2 to 8, oldest tap first.
        bias: `(dim,)`.
        slots: int32 or int64 `(>= n,)` or `(>= n, columns)`, of which column 0 is read; two rows must not share a slot.
            None: row i uses slot i, and no row is null.
        cu_seqlens: int32 or int64 `(n + 1,)`; row i owns tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        num_accepted_tokens: int32 or int64 `(n,)`; speculative decoding: how many tokens of the last call were right.
        silu: apply silu to the result.
        null_slot: a row whose slot is this or negative is nobody: its output is zero and no state is touched.
        out: like `x`, of any floating dtype. Mutated.

    All floating dtypes mix; everything is computed in float32 (float64 for float64 `x`) and rounded once at each store.
    A row without tokens leaves its state alone; tokens that belong to no row are neither read nor written.

    With q new tokens in a row, `window` its last width - 1 inputs followed by these q, and state its slot:

        out[t] = silu(bias + sum_j weight[:, j] * window[t + j])        j = 0 .. width - 1
        window = [state[:, first : first + width - 1], x_0 .. x_(q-1)]

    Without `num_accepted_tokens`, first is 0 and columns 0 .. width - 2 become the last width - 1 entries of window.
    With it, first is num_accepted_tokens - 1 (clamped to the columns there are) and columns 0 .. width - 3 + q become
    window[1:], that is every input that the next call may go back to; what does not fit in state_len is dropped.
    All other columns stay.
    """
    output = given(out)
    n = _row_count(x, cu_seqlens)
    if n == 0 or x.numel() == 0:
        return output
    dim, width = weight.shape
    history, state_len = width - 1, conv_state.shape[2]

    if cu_seqlens is None and num_accepted_tokens is None:
        return _step(x, conv_state, weight, bias, slots, silu, null_slot, output)

    rows = torch.arange(n, device=x.device)
    if cu_seqlens is None:
        length = 1 if x.dim() == 2 else x.shape[1]
        starts, ends = rows * length, (rows + 1) * length
    else:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = ends - starts
    slot, live = (column[:, 0] for column in row_slots(slots, n, null_slot, x.device))
    # A window starts at column `first`; `kept` of its entries, from entry `kept_from` on, are what the state keeps.
    zero = torch.zeros_like(rows)
    if num_accepted_tokens is None:
        first, kept, kept_from = zero, zero + history, lengths
    else:
        first = (num_accepted_tokens.long() - 1).clamp(0, state_len - history)
        kept, kept_from = lengths + history - 1, zero + 1

    tokens = x.reshape(-1, dim)
    state = conv_state[torch.where(live, slot, 0)]

    def window(row: Tensor, entry: Tensor, dtype: torch.dtype) -> Tensor:
        """Gather entries of rows' windows as `(..., dim)`; an index outside a window gives anything."""
        old = state[row, :, (first[row] + entry).clamp(0, state_len - 1)]
        new = tokens[(starts[row] + entry - history).clamp(0, tokens.shape[0] - 1)]
        return torch.where((entry < history).unsqueeze(-1), old.to(dtype), new.to(dtype))

    # Every token looks up its row, then the `width` entries of the row's window that end at it.
    token = torch.arange(tokens.shape[0], device=x.device)
    row = torch.bucketize(token, ends.contiguous(), right=True).clamp(max=n - 1)
    owned = (token >= starts[row]) & (token < ends[row])
    taps = torch.arange(width, device=x.device)
    compute = torch.promote_types(x.dtype, torch.float32)
    inputs = window(row.unsqueeze(1), (token - starts[row]).unsqueeze(1) + taps, compute)
    acc = weight.new_zeros(dim, dtype=compute) if bias is None else bias.to(compute)
    for tap in range(width):
        acc = acc + inputs[:, tap] * weight[:, tap].to(compute)
    if silu:
        acc = acc / (1 + torch.exp(-acc))  # not torch.sigmoid: on a CPU its last bit depends on an element's place
    acc = torch.where(live[row].unsqueeze(-1), acc, 0)

    # Old entries move as they are, new ones are rounded to the state's dtype.
    columns = torch.arange(state_len, device=x.device)
    moved = window(rows.unsqueeze(1), kept_from.unsqueeze(1) + columns, conv_state.dtype).transpose(1, 2)
    state = torch.where((columns < kept.unsqueeze(1)).unsqueeze(1), moved, state)

    result = torch.where(owned.unsqueeze(-1), acc.to(output.dtype), output.reshape(-1, dim))
    output.copy_(result.reshape(x.shape))
    store_rows(conv_state, slot, state, live & (lengths > 0))
    return output


def _step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    silu: bool,
    null_slot: int,
    output: Tensor,
) -> Tensor:
    """The usual call, rows of one length that no token was taken back from: no row needs an index of its own."""
    n, history = x.shape[0], weight.shape[1] - 1
    compute = torch.promote_types(x.dtype, torch.float32)
    new = x.unsqueeze(1) if x.dim() == 2 else x
    if slots is None:
        live, state = None, conv_state[:n, :, :history]
    else:
        slot = slot_columns(slots, n)[:, 0]
        live = ~is_null(slot, null_slot)
        state = conv_state[torch.where(live, slot, 0)]
    old = state[:, :, :history].transpose(1, 2)

    window = torch.cat((old.to(compute), new.to(compute)), dim=1)
    acc = weight.new_zeros(x.shape[-1], dtype=compute) if bias is None else bias.to(compute)
    for tap in range(history + 1):
        acc = acc + window[:, tap : tap + new.shape[1]] * weight[:, tap].to(compute)
    if silu:
        acc = acc / (1 + torch.exp(-acc))  # not torch.sigmoid: on a CPU its last bit depends on an element's place
    if live is not None:
        acc = torch.where(live.view(n, 1, 1), acc, 0)
    output.copy_(acc.view_as(x))

    # Old entries move as they are, new ones are rounded to the state's dtype.
    moved = torch.cat((old, new.to(old.dtype)), dim=1)[:, new.shape[1] :].transpose(1, 2)
    if live is None:
        state.copy_(moved)
    else:
        state[:, :, :history] = moved
        store_rows(conv_state, slot, state, live)
    return output


@causal_conv1d_update.checks
def _checks(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    output: Tensor,
) -> None:
    floating(x=x, conv_state=conv_state, weight=weight, bias=bias, out=output)
    one_device(x.device, conv_state=conv_state, weight=weight, bias=bias, slots=slots, cu_seqlens=cu_seqlens)
    one_device(x.device, num_accepted_tokens=num_accepted_tokens, out=output)

    packed_rows(cu_seqlens)
    if cu_seqlens is None:
        tensor_rank("x", x, {2: "(n, dim)", 3: "(n, length, dim)"})
    else:
        tensor_rank("x", x, {2: "(tokens, dim)"}, hint="with cu_seqlens the rows are packed one after another")
    tensor_rank("conv_state", conv_state, {3: "(slots, dim, state_len)"})
    tensor_rank("weight", weight, {2: "(dim, width)"}, hint="squeeze the middle axis of a Conv1d's weight")

    n, dim, width = _row_count(x, cu_seqlens), x.shape[-1], weight.shape[1]
    if not 2 <= width <= 8:
        raise bad_argument("weight", got=f"width {width}", expected="a width of 2 to 8")
    shape_is("weight", weight, (dim, width), hint="its dim is the last axis of x")
    shape_is("bias", bias, (dim,))
    shape_is("out", output, tuple(x.shape), hint="it is like x")

    slot_count, state_len = conv_state.shape[0], conv_state.shape[2]
    shape_is("conv_state", conv_state, (slot_count, dim, state_len), hint="its dim is the last axis of x")
    slot_table("slots", slots, rows=n)
    if slots is None and slot_count < n:
        hint = "without slots row i uses slot i"
        raise bad_argument("conv_state", got=f"{slot_count} slots", expected=f"at least {n}", hint=hint)
    needed, hint = width - 1, "it holds the last width - 1 inputs"
    if num_accepted_tokens is not None:
        index_tensor("num_accepted_tokens", num_accepted_tokens)
        shape_is("num_accepted_tokens", num_accepted_tokens, (n,), hint="one count a row")
        if x.dim() == 3 and x.shape[1] > 1:
            needed, hint = width - 2 + x.shape[1], "with num_accepted_tokens it also holds the new inputs, less one"
    if state_len < needed:
        raise bad_argument("conv_state", got=f"state_len {state_len}", expected=f"at least {needed}", hint=hint)


@causal_conv1d_update.outputs
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@causal_conv1d_update.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.bfloat16,
    dim: int = 24,
    width: int = 4,
    length: int = 3,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; `length` is the number of tokens of a longer row."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def cache(*, width: int = width, extra: int = 0, unused: int = 0, dtype: torch.dtype = state_dtype) -> Tensor:
        """Six slots, `dim` contiguous, with `extra` columns beyond width - 1 and `unused` ones between the slots."""
        return normal(6, width - 1 + extra + unused, dim, dtype=dtype)[:, unused:].transpose(1, 2)

    def indices(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    weight, slots = normal(dim, width), indices(5, 0, 3, 2)
    base: dict[str, Any] = {"bias": normal(dim), "slots": slots}
    varlen = {**base, "cu_seqlens": indices(0, length, length + 1, 2 * length + 1, 3 * length + 1)}
    tokens = 3 * length + 1
    spec = {"num_accepted_tokens": indices(1, length, 2, 1)}

    yield Sample("base", (normal(4, dim), cache(), weight), base)
    yield Sample("no optional", (normal(4, dim), cache(), weight), {})
    yield Sample("no bias", (normal(4, dim), cache(), weight), {"slots": slots})
    yield Sample("no slots", (normal(4, dim), cache(), weight), {"bias": base["bias"]})
    yield Sample("no silu", (normal(4, dim), cache(), weight), {**base, "silu": False})
    for other in (2, 8):
        yield Sample(f"width {other}", (normal(4, dim), cache(width=other), normal(dim, other)), base)
    yield Sample("one row", (normal(1, dim), cache(), weight), base)
    yield Sample("no rows", (normal(0, dim), cache(), weight), base)
    for other_dtype in (torch.float16, torch.float32):
        other_base = {"bias": normal(dim, dtype=other_dtype), "slots": slots}
        arguments = normal(4, dim, dtype=other_dtype), cache(dtype=other_dtype), normal(dim, width, dtype=other_dtype)
        yield Sample(short(other_dtype), arguments, other_base)
    mixed = {**base, "out": normal(4, dim, dtype=torch.float32)}
    yield Sample("mixed dtypes", (normal(4, dim), cache(dtype=torch.float16), weight.float()), mixed)

    yield Sample("columns contiguous", (normal(4, dim), cache().contiguous(), weight), base)
    yield Sample("padded slots", (normal(4, dim), cache(unused=2), weight), base)
    yield Sample("more columns", (normal(4, dim), cache(extra=2), weight), base)
    yield Sample("sliced x", (normal(4, 2 * dim)[:, dim:], cache(), weight), base)
    yield Sample("transposed x", (normal(dim, 4).t(), cache(), weight), base)
    strided = {**base, "bias": normal(2 * dim)[::2], "out": normal(dim, 4).t()}
    yield Sample("strided weights and out", (normal(4, dim), cache(), normal(width, dim).t()), strided)

    yield Sample("null rows", (normal(4, dim), cache(), weight), {**base, "slots": indices(5, -1, -7, 2)})
    yield Sample("null slot 0", (normal(4, dim), cache(), weight), {**base, "null_slot": 0})
    yield Sample("only null rows", (normal(4, dim), cache(), weight), {**base, "slots": indices(-1, -1, -1, -1)})
    column = indices(5, 0, 3, 2, 1, dtype=torch.int64)
    table = torch.stack((column, column.roll(1)), dim=1)
    yield Sample("slot columns", (normal(4, dim), cache(), weight), {**base, "slots": table})

    yield Sample("rows of length", (normal(4, length, dim), cache(), weight), base)
    transposed = {**base, "out": normal(4, dim, length).transpose(1, 2)}
    yield Sample("rows of length, transposed", (normal(4, dim, length).transpose(1, 2), cache(), weight), transposed)
    yield Sample("rows of no length", (normal(4, 0, dim), cache(), weight), base)
    yield Sample("packed", (normal(tokens, dim), cache(), weight), varlen)
    empty = {**varlen, "cu_seqlens": indices(0, 0, tokens, tokens, tokens, dtype=torch.int64)}
    yield Sample("empty rows", (normal(tokens, dim), cache(), weight), empty)
    past = {**varlen, "out": normal(tokens + 2, dim)}
    yield Sample("tokens past the end", (normal(tokens + 2, dim), cache(), weight), past)

    yield Sample("speculative, one token", (normal(4, dim), cache(extra=length - 1), weight), {**base, **spec})
    speculative = normal(4, length, dim), cache(extra=length - 1), weight
    yield Sample("speculative", speculative, {**base, **spec})
    yield Sample("speculative, packed", (normal(tokens, dim), cache(extra=length - 1), weight), {**varlen, **spec})
    yield Sample("speculative, empty rows", (normal(tokens, dim), cache(extra=length - 1), weight), {**empty, **spec})
    yield Sample("speculative, columns dropped", (normal(tokens, dim), cache(), weight), {**varlen, **spec})
    counts = {"num_accepted_tokens": indices(0, 100, -3, 1, dtype=torch.int64)}
    yield Sample("counts out of range", (normal(4, dim), cache(extra=length - 1), weight), {**base, **counts})

    everything = {**past, **spec, "slots": table.roll(1, 0), "null_slot": 5, "silu": False}
    x = normal(tokens + 2, 3 * dim)[:, dim : 2 * dim]
    yield Sample("everything", (x, cache(extra=length - 1, unused=1, dtype=torch.float32), weight), everything)


def _row_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
