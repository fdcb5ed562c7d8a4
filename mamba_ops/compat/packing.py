"""Sequences behind each other in the rows of a batch: how the imitated functions are told of them, and the ops."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from mamba_ops.compat.arguments import upcast
from mamba_ops.ops._common.decay import limited

_INTEGERS = (torch.int32, torch.int64)


class Packed:
    """Sequences of a call's rows. Where there are none, every row is one, and nothing below does anything.

    The ops take one row of all tokens, and where its sequences end: `flat`, `rows`. Their number is known to the device
    alone where `seq_idx` tells of them; an eager call waits for it, once a tensor. A graph can't: there `first` says
    which tokens begin anew, and the decay of such a token forgets what was before (`without_past`).

    Attributes:
        cu_seqlens: (n + 1,), sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1] of all rows; or None.
        first: bool (batch, length), the tokens that begin a sequence within a row; or None.
        outside: bool (batch, length), the tokens of no sequence, whose number is negative; None: there are none.
    """

    def __init__(
        self, function: str, rows: Sequence[int], seq_idx: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> None:
        """Take sequences from `cu_seqlens` where it is given, else from `seq_idx`.

        Args:
            function: who was called, for errors.
            rows: (batch, length) of the call's tensors.
            seq_idx: integers `(batch, length)`: a sequence begins where a row does, and where the number changes.
            cu_seqlens: int32 or int64 `(n + 1,)`; batch is 1 then.
        """
        batch, length = rows
        self._function, self._rows = function, (batch, length)
        self.first: Tensor | None = None
        self.outside: Tensor | None = None
        if seq_idx is not None and (seq_idx.shape != (batch, length) or seq_idx.dtype not in _INTEGERS):
            got = f"{str(seq_idx.dtype).removeprefix('torch.')} of shape {tuple(seq_idx.shape)}"
            expected = f"int32 or int64 of shape {(batch, length)}: which sequence each token is of"
            raise ValueError(f"{function}: seq_idx: got {got}, expected {expected}")
        if cu_seqlens is not None:
            if batch != 1:
                expected = "1: all sequences are packed into one row"
                raise ValueError(f"{function}: cu_seqlens: got a batch of {batch}, expected {expected}")
        elif seq_idx is not None and torch.compiler.is_compiling():
            self.first, self.outside = begins_anew(seq_idx), seq_idx < 0
        elif seq_idx is not None:
            cu_seqlens, self.outside = _read(seq_idx)
        self.cu_seqlens = cu_seqlens

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens is not None or self.first is not None

    def flat(self, tensor: Tensor) -> Tensor:
        """Return `(batch, length, ...)` as the op takes it: `(batch * length, ...)` where sequences are packed."""
        return tensor if self.cu_seqlens is None else tensor.flatten(0, 1)

    def rows(self, tensor: Tensor) -> Tensor:
        """Return the op's output as `(batch, length, ...)`."""
        return tensor if self.cu_seqlens is None else tensor.unflatten(0, self._rows)

    def count(self) -> int:
        """Return of how many sequences the op has states."""
        return self._rows[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def last(self, states: Tensor) -> Tensor:
        """Return the states of each row's last sequence, of those of all sequences."""
        if self.cu_seqlens is None:
            return states
        batch, length = self._rows
        ends = torch.arange(1, batch + 1, device=states.device, dtype=self.cu_seqlens.dtype) * length
        last = torch.bucketize(ends, self.cu_seqlens[1:].contiguous())
        return states[last.clamp(max=states.shape[0] - 1)]

    def initial(self, name: str, states: Tensor | None) -> Tensor | None:
        """Return initial states of all sequences: of each, or of each row, whose first sequence they are for."""
        if states is None or self.cu_seqlens is None:
            return states
        batch, length = self._rows
        n = self.count()
        if states.shape[0] == n:
            return states
        if states.shape[0] != batch:
            expected = f"{batch} of the rows, or {n} of the sequences"
            raise ValueError(f"{self._function}: {name}: got {states.shape[0]} states, expected {expected}")
        begins, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        is_first = (begins % max(length, 1) == 0) & (ends > begins)
        row = (begins // max(length, 1)).clamp(max=batch - 1)
        return torch.where(is_first.view(-1, *[1] * (states.dim() - 1)), states[row], 0)


def begins_anew(seq_idx: Tensor) -> Tensor:
    """Return bool (batch, length): which tokens are of another sequence than the one before in their row."""
    changes = seq_idx[:, 1:] != seq_idx[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0))


class _Known(NamedTuple):
    """What was read of a seq_idx: weak reference and version say whether it is still that."""

    tensor: weakref.ref[Tensor]
    version: int
    cu_seqlens: Tensor
    outside: Tensor | None


_known: dict[int, _Known] = {}  # by a tensor's id: all layers of a model get the same one


def remember(seq_idx: Tensor) -> Tensor:
    """Return a tensor that this package has made and that nobody changes: it is read once, in inference mode too."""
    _read(seq_idx, is_own=True)
    return seq_idx


def cu_seqlens_of(seq_idx: Tensor) -> Tensor:
    """Return where the sequences of all rows end, int64 `(n + 1,)`; waits for the device once a tensor."""
    return _read(seq_idx)[0]


def _read(seq_idx: Tensor, is_own: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return where sequences end, and the tokens of none if there are any; waits for the device once a tensor.

    A tensor of inference mode does not say whether it changed; it is read each time.
    """
    known = _known.get(id(seq_idx))
    version = -1 if seq_idx.is_inference() else seq_idx._version
    if known is not None and known.tensor() is seq_idx and known.version == version:
        return known.cu_seqlens, known.outside
    with torch.inference_mode(seq_idx.is_inference()):  # so that what is kept may be used where gradients are recorded
        first = begins_anew(seq_idx)
        first[:, :1] = True
        begins = first.flatten().nonzero().flatten()
        cu_seqlens = torch.cat((begins, begins.new_full((1,), seq_idx.numel())))
        outside = seq_idx < 0
    found = cu_seqlens, outside if bool(outside.any()) else None
    if version >= 0 or is_own:
        for key in [key for key, old in list(_known.items()) if old.tensor() is None]:
            _known.pop(key, None)
        _known[id(seq_idx)] = _Known(weakref.ref(seq_idx), version, *found)
    return found


class WithoutPast(NamedTuple):
    """Inputs of a scan in which the tokens that begin anew forget all; D and the gate come after it."""

    x: Tensor
    dt: Tensor


_FORGOTTEN = 128.0
"""e to the minus this is nothing, beside anything that float32 can hold."""


def without_past(
    first: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    limit: tuple[float, float] | None = None,
) -> WithoutPast:
    """Return inputs whose first tokens have a step so long that nothing is left, and are pushed with the same weight.

    Args:
        first: bool (batch, length).
        x: `(batch, length, heads, dim)`, or `(batch, length, dim)`.
        dt: `(batch, length, heads)`, or `(batch, length, dim)`.
        A: `(heads,)`, or `(dim, dstate)`.
        dt_bias, dt_softplus, limit: what is done to dt first.
    """
    compute = upcast(x)
    step = dt.to(compute)
    if dt_bias is not None:
        step = step + dt_bias.to(compute)
    if dt_softplus:
        step = softplus(step)
    if limit is not None:
        step = limited(step, *limit)
    rates = A.detach().to(compute).abs()
    long = _FORGOTTEN / (rates.amin(-1) if A.dim() == 2 else rates).clamp(min=1e-30)
    begins = first.unsqueeze(-1)
    share = torch.where(begins, step / long, 1)
    weighted = x.to(compute) * (share if x.dim() == dt.dim() else share.unsqueeze(-1))
    return WithoutPast(weighted, torch.where(begins, long.expand_as(step), step))


def with_skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return what a scan of `without_past` gives: the skip of x, then the gate; all in y's dtype, rounded to x's."""
    if D is not None:
        of_heads = D.dim() == 1 and x.dim() == 4
        y = y + (D.unsqueeze(-1) if of_heads else D).to(y.dtype) * x
    if z is not None:
        y = y * silu(z.to(y.dtype))
    return y.to(x.dtype)


def convolved_apart(
    first: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, *, activate: bool
) -> Tensor:
    """Convolve rows `(batch, length, dim)`, of which each token sees those of its own sequence alone.

    Args:
        first: bool (batch, length).
        x: `(batch, length, dim)`.
        weight, bias: `(dim, width)`, `(dim,)`.
        past: `(batch, dim, width - 1)`, what was before the rows; None: zeros.
        activate: whether silu comes last.
    """
    compute = upcast(x)
    width, length = weight.shape[1], x.shape[1]
    before = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if past is None else past.transpose(1, 2).to(x.dtype)
    inputs = torch.cat((before, x), dim=1).to(compute)
    number = torch.nn.functional.pad(first.cumsum(1), (width - 1, 0))  # the past has the number of the first sequence
    taps, out = weight.to(compute), inputs.new_zeros(()) if bias is None else bias.to(compute)
    for tap in range(width):
        part = slice(tap, tap + length)
        is_own = number[:, part] == number[:, width - 1 :]
        out = out + torch.where(is_own.unsqueeze(-1), inputs[:, part], 0) * taps[:, tap]
    return (silu(out) if activate else out).to(x.dtype)
