"""mamba_chunk_scan on a CPU, row by row: chunks are short, and what is worked on stays in the processor's cache.

Every row takes the same calls of torch whatever the other rows are, so its bits do not depend on them, though those of
`exp2` and of products depend on where in a tensor an element stands.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.decay import finite_rates, log_decay_between
from mamba_ops.ops._common.rows import RowTokens
from mamba_ops.ops._common.slots import initial_states, row_ends, store_rows

if TYPE_CHECKING:
    from mamba_ops.ops.mamba_chunk_scan.op import Arguments

_CHUNK = 64  # tokens, and pairs of each two of them
_BLOCK = 2**18  # numbers of a head and a pair of tokens at a time: 1 MiB in float32
_LEAST = -1e4  # logarithm of a decay that leaves nothing, so small that sums of these have the others' last bits


def scan_rows(call: "Arguments", rows: RowTokens, compute: torch.dtype) -> None:
    """Run the op on rows whose bounds the host knows. No states of chunks are kept."""
    (heads, dim), dstate, groups, cache = call.x.shape[-2:], call.B.shape[-1], call.B.shape[-2], call.ssm_state
    ends = row_ends(call.slots, call.write_slots, call.null_slot, rows.empty(), cache)
    last = call.x.new_zeros(rows.number, heads, dim, dstate, dtype=compute)
    if cache is not None and call.has_initial_state is not None:
        last = initial_states(cache, ends, call.has_initial_state, compute).contiguous()
    scan = _Scan(call, compute)
    for row in range(rows.number):
        state = last[row].view(groups, -1, dstate)
        state.copy_(scan.read(rows, row, state.transpose(1, 2)).transpose(1, 2))
        if call.slots is not None:
            rows.zero_unless(call.output, row, ends.is_active)
    if cache is None:
        return
    if call.slots is None and call.write_slots is None and rows.have_tokens:
        cache[: rows.number].copy_(last)
    else:
        store_rows(cache, ends.target, last, ends.stored)


class _Decays(NamedTuple):
    """Of some chunks, (chunks, size, heads) but for one."""

    since: Tensor  # from before the chunk to each token
    until: Tensor  # from each token to the chunk's end
    between: Tensor  # (chunks, heads, size, size): from a token, the last index, to another


class _Scan:
    """What is the same for all rows: parameters in the dtype that is computed in."""

    def __init__(self, call: "Arguments", compute: torch.dtype) -> None:
        self.call, self.compute = call, compute
        self.heads, self.dim = call.x.shape[-2:]
        self.groups, self.dstate = call.B.shape[-2:]
        self.rates = finite_rates(call.A.to(compute))
        self.bias = None if call.dt_bias is None else call.dt_bias.to(compute)
        self.skip = None if call.D is None else (call.D if call.D.dim() == 2 else call.D.unsqueeze(1)).to(compute)

    def read(self, rows: RowTokens, row: int, state: Tensor) -> Tensor:
        """Write a row's outputs, and return `state`, (groups, dstate, channels of a group), after its tokens."""
        call = self.call
        given = [rows.of(tokens, row) for tokens in (call.x, call.dt, call.B, call.C)]
        gate = None if call.z is None else rows.of(call.z, row)
        output, length, begin = rows.of(call.output, row), given[0].shape[0], 0
        while begin < length:
            size = min(_CHUNK, call.chunk_size, length - begin)
            chunks = max(1, min((length - begin) // size, _BLOCK // (self.heads * size * size)))
            part = slice(begin, begin + chunks * size)
            begin = part.stop
            x, dt, B, C = (tokens[part].to(self.compute).unflatten(0, (chunks, size)) for tokens in given)
            y, state = self._chunks(x, self._steps(dt), B, C, state)
            y = y.flatten(0, 1)
            if gate is not None:
                z = gate[part].to(self.compute)
                y.mul_(z / torch.neg(z).exp_().add_(1))
            output[part] = y
        return state

    def _steps(self, dt: Tensor) -> Tensor:
        if self.bias is not None:
            dt = dt + self.bias
        if self.call.dt_softplus:
            dt = torch.where(dt > 20, dt, torch.exp(dt).log1p_())
        return dt.clamp(self.call.dt_min, self.call.dt_max)

    def _decays(self, steps: Tensor) -> _Decays:
        if self.compute == torch.float64:
            a = (steps * self.rates).transpose(1, 2)
            between = log_decay_between(a).exp_()
            return _Decays(torch.exp(a.cumsum(2)).transpose(1, 2), between[:, :, -1].transpose(1, 2), between)
        # The difference of two sums, each in two parts, of which the lower one has what the upper one rounds away.
        size = steps.shape[1]
        sums = (steps * self.rates).clamp_(min=_LEAST).double().mul_(math.log2(math.e)).cumsum_(1)
        upper = sums.to(self.compute)
        lower = (sums - upper).to(self.compute)
        until = (sums[:, -1:] - sums).to(self.compute).exp2_()
        of_later = self.rates.new_full((size, size), -torch.inf).triu_(1)
        upper_by_head, lower_by_head = (s.transpose(1, 2).contiguous() for s in (upper, lower))
        between = upper_by_head.unsqueeze(3) - upper_by_head.unsqueeze(2)
        between += lower_by_head.unsqueeze(3)
        between -= lower_by_head.unsqueeze(2)
        between += of_later
        return _Decays(upper.exp2_(), until, between.exp2_())

    def _chunks(self, x: Tensor, d: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of some chunks of one size without their gate, (chunks, size, heads, dim), and the state after
        the last one.
        """
        chunks, size, heads, dim = x.shape
        groups, dstate = self.groups, self.dstate
        of_group = (groups, heads // groups)
        since, until, between = self._decays(d)

        def by_group(tokens: Tensor) -> Tensor:
            """Of tokens, (chunks, size, groups or heads, ...), as (chunks * groups, size, the rest)."""
            return tokens.reshape(chunks, size, groups, -1).transpose(1, 2).reshape(chunks * groups, size, -1)

        # What each chunk adds to the state, and the state before every chunk.
        B, C = (by_group(tensor) for tensor in (B, C))
        added = torch.bmm(B.transpose(1, 2), by_group(x * (until * d).unsqueeze(3)))
        added = added.view(chunks, groups, dstate, -1, dim)
        over, state = since[:, -1].view(chunks, groups, 1, -1, 1), state.unflatten(2, (-1, dim))
        begun = torch.empty_like(added)
        for at, more, factor in zip(begun.unbind(0), added.unbind(0), over.unbind(0), strict=True):
            at.copy_(state)
            state = more.addcmul_(at, factor)

        # What a token reads of the state before its chunk, and of the chunk's tokens up to itself.
        y = torch.bmm(C, begun.view(chunks * groups, dstate, -1)).view(chunks, groups, size, -1, dim)
        y = y.transpose(1, 2).reshape(chunks, size, heads, dim).mul_(since.unsqueeze(3))
        products = torch.bmm(C, B.transpose(1, 2))
        between.view(chunks, *of_group, size, size).mul_(products.view(chunks, groups, 1, size, size))
        pushed = torch.mul(x.transpose(1, 2), d.transpose(1, 2).unsqueeze(3), out=x.new_empty(chunks, heads, size, dim))
        of_chunk = torch.bmm(between.flatten(0, 1), pushed.flatten(0, 1)).view(chunks, heads, size, dim)
        y += of_chunk.transpose(1, 2)
        if self.skip is not None:
            y.addcmul_(self.skip, x)
        return y, state.flatten(2)
