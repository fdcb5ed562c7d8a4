"""causal_conv1d: the depthwise convolution of whole sequences, which may go on where a cache left off."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._namespace import mamba
from mamba_ops.ops.checking import floating, one_device, packed_rows, shape_is, short, slot_table, tensor_rank
from mamba_ops.ops.slots import row_slots, store_rows
from mamba_ops.registry import Sample, bad_argument, given

_BLOCK = 2**17  # numbers that the reference convolves at a time: a CPU's cache holds them


@mamba.op(mutates=("conv_state", "out"))
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    conv_state: Tensor | None = None,
    slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Convolve each sequence with its own past, write `out`, and leave the last inputs in `conv_state`, in place.

    Args:
        x: `(n, length, dim)`, or packed `(tokens, dim)` with `cu_seqlens`.
        weight: `(dim, width)`, width 2 to 8, oldest tap first.
        bias: `(dim,)`.
        cu_seqlens: int32 or int64 `(n + 1,)`; sequence i owns tokens cu_seqlens[i] up to cu_seqlens[i + 1].
        conv_state: `(slots, dim, state_len)`, state_len >= width - 1; column 0 is the oldest input. Mutated.
            None: every sequence starts from zeros and nothing is kept.
        slots: int32 or int64 `(>= n,)` or `(>= n, columns)`, of which column 0 is read; two sequences must not share a
            slot. None: sequence i uses slot i, and no sequence is null.
        has_initial_state: bool `(n,)`; which sequences go on from their slot. None: they all start from zeros.
        silu: apply silu to the result.
        null_slot: a sequence whose slot is this or negative is nobody: its output is zero and no state is touched.
        out: like `x`, of any floating dtype, in other memory. Mutated.

    All floating dtypes mix; everything is computed in float32 (float64 for float64 `x`) and rounded once at each store.
    An empty sequence leaves its state alone; tokens that belong to no sequence are neither read nor written.

    With h = width - 1, `past` the first h columns of a sequence's slot where it has an initial state and zeros where it
    has none, and window = [past, x_0 .. x_(length - 1)]:

        out[t] = silu(bias + sum_j weight[:, j] * window[t + j])        j = 0 .. h

    Columns 0 .. h - 1 of the slot become the last h entries of window; further columns stay.
    """
    output = given(out)
    n = _sequence_count(x, cu_seqlens)
    if n == 0 or x.numel() == 0:
        return output
    dim, width = weight.shape
    history = width - 1

    rows = torch.arange(n, device=x.device)
    if cu_seqlens is None:
        starts, ends = rows * x.shape[1], (rows + 1) * x.shape[1]
    else:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    starts, lengths = starts.unsqueeze(1), (ends - starts).unsqueeze(1)
    slot, live = (column[:, 0] for column in row_slots(slots, n, null_slot, x.device))
    tokens = x.reshape(-1, dim)
    total = tokens.shape[0]

    past = x.new_zeros(n, history, dim)
    if conv_state is not None:
        known = torch.zeros_like(live) if has_initial_state is None else has_initial_state & live
        columns = conv_state[torch.where(live, slot, 0), :, :history].transpose(1, 2)
        past = torch.where(known[:, None, None], columns, 0)
    entry = torch.arange(history, device=x.device)
    first = starts + entry  # the first tokens of each sequence, and what follows where it is shorter
    firsts = tokens[first.clamp(max=total - 1)]

    compute = torch.promote_types(x.dtype, torch.float32)
    taps = weight.t().to(compute).contiguous()
    start = taps.new_zeros(()) if bias is None else bias.to(compute)

    def convolve(entries: Tensor, acc: Tensor, scratch: Tensor) -> None:
        """Set each token of `acc` from the `width` entries that end at it; all are `(..., dim)`."""
        acc.copy_(start)
        for tap in range(width):
            acc += torch.mul(entries[..., tap : tap + acc.shape[-2], :], taps[tap], out=scratch)
        if silu:  # not torch.sigmoid: on a CPU its last bit depends on an element's place
            acc /= torch.neg(acc, out=scratch).exp_().add_(1)

    # All tokens as if they were one sequence; then those again that look into the past of their own.
    token = torch.arange(total, device=x.device)
    row = torch.bucketize(token, ends.contiguous(), right=True).clamp(max=n - 1)
    if slots is not None:
        nobody = ~live[row].unsqueeze(1)
    if cu_seqlens is not None:
        owned = ((token >= starts[row, 0]) & (token < ends[row])).unsqueeze(1)
    flat = output.reshape(-1, dim)
    block = min(max(_BLOCK // dim, 1), total)
    buffers = taps.new_empty(2, block, dim)
    for begin in range(history, total, block):
        part = slice(begin, min(begin + block, total))
        acc, scratch = buffers[:, : part.stop - begin]
        convolve(tokens[begin - history : part.stop].to(compute), acc, scratch)
        if slots is not None:
            acc.masked_fill_(nobody[part], 0)
        flat[part] = acc if cu_seqlens is None else torch.where(owned[part], acc.to(flat.dtype), flat[part])
    if flat.data_ptr() != output.data_ptr():
        output.copy_(flat.view(output.shape))
    acc, scratch = taps.new_empty(2, n, history, dim)
    convolve(torch.cat((past, firsts), dim=1).to(compute), acc, scratch)
    acc.masked_fill_(~live[:, None, None], 0)
    if cu_seqlens is None:
        output[:, :history] = acc[:, : x.shape[1]]
    else:
        store_rows(output, first.flatten(), acc.flatten(0, 1), (entry < lengths).flatten())

    if conv_state is not None:  # old entries move as they are, new ones are rounded to the state's dtype
        entry = lengths + entry
        old = past[rows.unsqueeze(1), entry.clamp(max=history - 1)].to(conv_state.dtype)
        new = tokens[(starts + entry - history).clamp(0, total - 1)].to(conv_state.dtype)
        kept = torch.where((entry < history).unsqueeze(-1), old, new).transpose(1, 2)
        store_rows(conv_state[..., :history], slot, kept, live & (lengths.squeeze(1) > 0))
    return output


@causal_conv1d.checks
def _checks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    output: Tensor,
) -> None:
    floating(x=x, weight=weight, bias=bias, conv_state=conv_state, out=output)
    one_device(x.device, weight=weight, bias=bias, cu_seqlens=cu_seqlens, conv_state=conv_state, slots=slots)
    one_device(x.device, has_initial_state=has_initial_state, out=output)

    packed_rows(cu_seqlens)
    if cu_seqlens is None:
        tensor_rank("x", x, {3: "(n, length, dim)"}, hint="packed sequences need cu_seqlens")
    else:
        tensor_rank("x", x, {2: "(tokens, dim)"}, hint="with cu_seqlens the sequences are packed one after another")
    tensor_rank("weight", weight, {2: "(dim, width)"}, hint="squeeze the middle axis of a Conv1d's weight")

    n, dim, width = _sequence_count(x, cu_seqlens), x.shape[-1], weight.shape[1]
    if not 2 <= width <= 8:
        raise bad_argument("weight", got=f"width {width}", expected="a width of 2 to 8")
    shape_is("weight", weight, (dim, width), hint="its dim is the last axis of x")
    shape_is("bias", bias, (dim,))
    shape_is("out", output, tuple(x.shape), hint="it is like x")

    slot_table("slots", slots, rows=n)
    if has_initial_state is not None and has_initial_state.dtype != torch.bool:
        got = short(has_initial_state.dtype)
        raise bad_argument("has_initial_state", got=got, expected="bool", hint="compare it with 0")
    shape_is("has_initial_state", has_initial_state, (n,), hint="one a sequence")
    if conv_state is None:
        for name, tensor in {"slots": slots, "has_initial_state": has_initial_state}.items():
            if tensor is not None:
                hint = "pass the cache that it speaks of, or leave both out"
                raise bad_argument(name, got="a tensor", expected="None where there is no conv_state", hint=hint)
        return
    tensor_rank("conv_state", conv_state, {3: "(slots, dim, state_len)"})
    slot_count, state_len = conv_state.shape[0], conv_state.shape[2]
    shape_is("conv_state", conv_state, (slot_count, dim, state_len), hint="its dim is the last axis of x")
    if slots is None and slot_count < n:
        hint = "without slots sequence i uses slot i"
        raise bad_argument("conv_state", got=f"{slot_count} slots", expected=f"at least {n}", hint=hint)
    if state_len < width - 1:
        hint = "it holds the last width - 1 inputs"
        raise bad_argument("conv_state", got=f"state_len {state_len}", expected=f"at least {width - 1}", hint=hint)


@causal_conv1d.outputs
def _output(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@causal_conv1d.samples
def _samples(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    state_dtype: torch.dtype = torch.bfloat16,
    dim: int = 24,
    width: int = 4,
    length: int = 6,
) -> Iterator[Sample]:
    """Yield the base call, then calls that change one thing each; `length` is that of dense sequences."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    def cache(*, width: int = width, extra: int = 0, unused: int = 0, dtype: torch.dtype = state_dtype) -> Tensor:
        """Six slots, `dim` contiguous, with `extra` columns beyond width - 1 and `unused` ones between the slots."""
        return normal(6, width - 1 + extra + unused, dim, dtype=dtype)[:, unused:].transpose(1, 2)

    def indices(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    x, weight, bias, slots = normal(3, length, dim), normal(dim, width), normal(dim), indices(5, 0, 3)
    known = torch.tensor((True, False, True), device=device)

    def base(**changes: Any) -> dict[str, Any]:
        return {"bias": bias, "conv_state": cache(), "slots": slots, "has_initial_state": known, **changes}

    yield Sample("base", (x, weight), base())
    yield Sample("no optional", (x, weight), {})
    yield Sample("no bias", (x, weight), base(bias=None))
    yield Sample("no cache", (x, weight), {"bias": bias})
    yield Sample("no slots", (x, weight), base(slots=None))
    yield Sample("no initial states", (x, weight), base(has_initial_state=None))
    yield Sample("no silu", (x, weight), base(silu=False))
    for other in (2, 8):
        yield Sample(f"width {other}", (x, normal(dim, other)), base(conv_state=cache(width=other)))
    yield Sample("one sequence", (x[:1], weight), base(has_initial_state=known[:1]))
    yield Sample("no sequences", (x[:0], weight), base(has_initial_state=known[:0]))
    yield Sample("one token each", (x[:, :1], weight), base())
    yield Sample("no tokens", (x[:, :0], weight), base())
    yield Sample("many tokens", (normal(3, 8 * length, dim), weight), base())
    for other_dtype in (torch.float16, torch.float32):
        changes = {"bias": bias.to(other_dtype), "conv_state": cache(dtype=other_dtype)}
        yield Sample(short(other_dtype), (x.to(other_dtype), weight.to(other_dtype)), base(**changes))
    mixed = base(conv_state=cache(dtype=torch.float16), out=normal(3, length, dim, dtype=torch.float32))
    yield Sample("mixed dtypes", (x, weight.float()), mixed)

    yield Sample("columns contiguous", (x, weight), base(conv_state=cache().contiguous()))
    yield Sample("padded slots", (x, weight), base(conv_state=cache(unused=2)))
    yield Sample("more columns", (x, weight), base(conv_state=cache(extra=2)))
    yield Sample("sliced x", (normal(3, length, 2 * dim)[..., dim:], weight), base())
    transposed = base(out=normal(3, dim, length).transpose(1, 2))
    yield Sample("transposed x", (normal(3, dim, length).transpose(1, 2), weight), transposed)
    strided = base(bias=normal(2 * dim)[::2], slots=torch.stack((slots, slots), 1)[:, 0])
    yield Sample("strided weights and slots", (x, normal(width, dim).t()), strided)

    yield Sample("null sequences", (x, weight), base(slots=indices(-1, -7, 3)))
    yield Sample("null slot 0", (x, weight), base(null_slot=0))
    yield Sample("only null sequences", (x, weight), base(slots=indices(-1, -1, -1)))
    column = indices(5, 0, 3, 2, 1, dtype=torch.int64)
    table = torch.stack((column, column.roll(1)), dim=1)
    yield Sample("slot columns", (x, weight), base(slots=table))

    ends = (0, 16, 18, 51)  # a power of two of tokens, fewer than a window looks back, and many
    tokens, packed = ends[-1], base(cu_seqlens=indices(*ends))
    yield Sample("packed", (normal(tokens, dim), weight), packed)
    yield Sample("packed, no cache", (normal(tokens, dim), weight), {"cu_seqlens": indices(*ends)})
    yield Sample("packed, one sequence", (normal(tokens, dim), weight), {"cu_seqlens": indices(0, tokens)})
    yield Sample("packed, no sequences", (normal(tokens, dim), weight), {"cu_seqlens": indices(0)})
    transposed = {**packed, "out": normal(dim, tokens, dtype=torch.float32).t()}
    yield Sample("packed, transposed", (normal(dim, tokens).t(), weight), transposed)
    empty = {**packed, "cu_seqlens": indices(0, 0, tokens, tokens, dtype=torch.int64)}
    yield Sample("empty sequences", (normal(tokens, dim), weight), empty)
    past = {**packed, "slots": indices(5, -1, 3), "out": normal(tokens + length, dim)}
    yield Sample("tokens past the end", (normal(tokens + length, dim), weight), past)
    later = {**packed, "cu_seqlens": indices(*ends) + 20, "out": normal(tokens + 20, dim)}
    yield Sample("tokens before the start", (normal(tokens + 20, dim), weight), later)

    state = cache(extra=1, unused=1, dtype=torch.float32)
    everything = {**past, "conv_state": state, "slots": table.roll(1, 0), "null_slot": 5, "silu": False}
    yield Sample("everything", (normal(tokens + length, 3 * dim)[:, dim : 2 * dim], weight), everything)


def _sequence_count(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
