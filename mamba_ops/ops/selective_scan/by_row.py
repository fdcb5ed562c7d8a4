"""selective_scan on a CPU, row by row: each token is read once, and what is worked on stays in the processor's cache.

Every row takes the same calls of torch whatever the other rows are, so its bits do not depend on them, though those of
`exp2` and of sums depend on where in a tensor an element stands.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.ops._common.decay import finite_rates
from mamba_ops.ops._common.rows import RowTokens
from mamba_ops.ops._common.slots import initial_states, row_ends, store_rows

if TYPE_CHECKING:
    from mamba_ops.ops.selective_scan.op import Arguments

_BLOCK = 2**18  # numbers of decays, and of states, at a time: 1 MiB in float32


def scan_rows(call: "Arguments", rows: RowTokens, compute: torch.dtype) -> None:
    """Run the op on rows whose bounds the host knows. There is no prefix cache."""
    (dim, dstate), cache = call.A.shape, call.ssm_state
    groups = call.B.shape[-2] if call.B.dim() > call.x.dim() else 1
    ends = row_ends(call.slots, call.write_slots, call.null_slot, rows.empty(), cache)
    initial = None
    if cache is not None and call.has_initial_state is not None:
        initial = initial_states(cache, ends, call.has_initial_state, compute)

    def by_group(channels: Tensor) -> Tensor:
        """A state, or what is like one, as (groups, dstate, channels of a group)."""
        return channels.view(groups, -1, dstate).transpose(1, 2)

    rates = by_group(finite_rates(call.A.to(compute) * math.log2(math.e))).contiguous()
    scan = _Scan(call, rates, compute)
    last = call.x.new_zeros(rows.number, dim, dstate, dtype=compute) if initial is None else initial
    for row in range(rows.number):
        scan.read(rows, row, by_group(last[row]))
        if call.slots is not None:
            rows.zero_unless(call.output, row, ends.is_active)
    if cache is None:
        return
    if call.slots is None and call.write_slots is None and rows.have_tokens:
        cache[: rows.number].copy_(last)
    else:
        store_rows(cache, ends.target, last, ends.stored)


class _Scan:
    """What is the same for all rows: parameters in the dtype that is computed in, and room for a block of tokens."""

    def __init__(self, call: "Arguments", rates: Tensor, compute: torch.dtype) -> None:
        self.call, self.rates, self.compute = call, rates, compute
        self.bias, self.skip = (None if t is None else t.to(compute) for t in (call.dt_bias, call.D))
        tokens = call.x.shape[0] if call.cu_seqlens is not None else call.x.shape[1]
        self.size = max(1, min(tokens, _BLOCK // rates.numel()))
        self.room = rates.new_empty(2, self.size, *rates.shape)

    def read(self, rows: RowTokens, row: int, state: Tensor) -> None:
        """Write a row's outputs, and advance `state`, (groups, dstate, channels of a group), by its tokens."""
        call = self.call
        given = [rows.of(tokens, row) for tokens in (call.x, call.dt, call.B, call.C)]
        gate = None if call.z is None else rows.of(call.z, row)
        output, length = rows.of(call.output, row), given[0].shape[0]
        now = state
        for begin in range(0, length, self.size):
            part = slice(begin, min(begin + self.size, length))
            x, dt, B, C = (tokens[part].to(self.compute).contiguous() for tokens in given)
            y, now = self._block(x, dt, B, C, now)
            if gate is not None:
                z = gate[part].to(self.compute)
                y.mul_(z / torch.neg(z).exp_().add_(1))
            output[part] = y
        if now is not state:
            state.copy_(now)

    def _block(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs of some tokens without their gate, (tokens, dim), and the state after the last one."""
        (groups, dstate, width), tokens = self.rates.shape, x.shape[0]
        decay, states = self.room[:, :tokens]
        if self.bias is not None:
            dt = dt + self.bias
        if self.call.dt_softplus:
            dt = torch.where(dt > 20, dt, torch.exp(dt).log1p_())
        B, C = (tensor.view(tokens, groups, dstate, 1) for tensor in (B, C))
        torch.mul(dt.view(tokens, groups, 1, width), self.rates, out=decay).exp2_()
        torch.mul((dt * x).view(tokens, groups, 1, width), B, out=states)
        for pushed, factor in zip(states.unbind(0), decay.unbind(0), strict=True):
            state = pushed.addcmul_(state, factor)
        y = torch.mul(states, C, out=decay).sum(2).view(tokens, -1)
        if self.skip is not None:
            y.addcmul_(self.skip, x)
        return y, state.clone()  # the room is needed for the next tokens
