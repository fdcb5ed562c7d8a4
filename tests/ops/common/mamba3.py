"""Mamba-3's recurrence, written from its formulas: one row and head, one token at a time."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.ops.common.exponential import exp

STEP = 2.0**-22
"""How far apart neighbours are in float32 at the largest angles, between 2 and pi: what an angle is off by that is
rounded twice, as it is reduced to a turn and as it is kept. All that it turns is off by as much, times its length.

A row and head has an angle or a few for many numbers of k, of the state and of the output. What the oracle's own angles
happen to be off by says little of what the worst of those may be. So one that rounds more has angles that are off as
far as roundings allow: by one of each token's turn, which is a product, and where they turn something by a step of the
angle's own."""


class Head:
    """The states of one row and head, in `dtype`; with `operands` k and q are rounded to that dtype, and what else
    chunked kernels give to matrix units to as many digits: values times their steps, and the state that is read.

    With `up`, (rank, dim), it is a head of MIMO: k, b and c are (rank, dstate), and outputs (rank, dim). With
    `rounds_more` its angles are off, see `STEP`.
    """

    def __init__(
        self,
        angle: Tensor,
        s: Tensor,
        k: Tensor,
        v: Tensor,
        operands: torch.dtype | None = None,
        up: Tensor | None = None,
        rounds_more: bool = False,
    ) -> None:
        self.angle, self.s, self.k, self.v, self.operands, self.up = angle, s, k, v, operands, up
        self.rounds_more = rounds_more

    def turn(self, vector: Tensor) -> Tensor:
        """Each angle turns a pair of the last axis: of neighbours, or for MIMO of one number in each half."""
        angle, half = self.angle + (STEP if self.rounds_more else 0), vector.shape[-1] // 2
        starts, step = ((0, 1), 2) if self.up is None else ((0, half), 1)
        first, second = (slice(start, start + step * len(angle), step) for start in starts)
        a, b, turned = vector[..., first], vector[..., second], vector.clone()
        turned[..., first] = a * torch.cos(angle) - b * torch.sin(angle)
        turned[..., second] = a * torch.sin(angle) + b * torch.cos(angle)
        return turned

    def rounded(self, vector: Tensor) -> Tensor:
        return vector if self.operands is None else vector.to(self.operands).to(vector.dtype)

    def shortened(self, tensor: Tensor) -> Tensor:
        """With as many digits as the operands have; the gradient is that of the tensor."""
        if self.operands is None:
            return tensor
        digits = 1 - int(math.log2(torch.finfo(self.operands).eps))
        mantissa, exponent = torch.frexp(tensor.detach())
        short = torch.ldexp(torch.round(mantissa * 2.0**digits) / 2.0**digits, exponent)
        return short + (tensor - tensor.detach()) if tensor.requires_grad else short

    def product(self, v: Tensor, k: Tensor) -> Tensor:
        """What a token adds to the state, but for its step."""
        k = self.rounded(k)
        if self.up is None:
            return v.unsqueeze(1) * k
        total = torch.zeros_like(self.s)
        for up, one in zip(self.up, k, strict=True):
            total = total + (v * up).unsqueeze(1) * one
        return total

    def token(self, x: Tensor, dt: Tensor, A: Tensor, trap: Tensor, angles: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Read a token; return what the state gives, without skip and gate."""
        turn = torch.tanh(angles) * math.pi * dt
        angle = self.angle + turn
        if self.rounds_more:
            angle = angle + turn.abs() * 2.0**-24
        self.angle = angle - 2 * math.pi * torch.round(angle / (2 * math.pi))
        k, q = self.turn(b), self.turn(c)
        early = torch.sigmoid(trap)
        before = self.product(self.shortened((1 - early) * dt * self.v), self.k)
        own = self.product(self.shortened(early * dt * x), k)
        self.s = exp((A * dt).clamp(max=0)) * (self.s + before) + own
        self.k, self.v = k, x
        return self.rounded(q) @ self.shortened(self.s).mT

    def finish(
        self, y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, of_z: Tensor | None, of_o: Tensor | None
    ) -> Tensor:
        """The output of a token with its skip, gated, and summed over the rank."""
        if D is not None:
            y = y + D * (x if self.up is None else x * self.up)
        if z is not None:
            gate = z if of_z is None else z * of_z
            y = y * gate * torch.sigmoid(gate)
        return y if of_o is None else (y * of_o).sum(0)


class Recurrence:
    """The recurrence of a call on its tokens and caches, of all heads of a row; what it writes is `output`, `states`.

    Computed in `dtype`. In float64 the results are float64 too; else they are rounded once, to what holds them.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        caches: Sequence[Tensor | None],
        *,
        B_bias: Tensor | None = None,
        C_bias: Tensor | None = None,
        D: Tensor | None = None,
        z: Tensor | None = None,
        mimo_x: Tensor | None = None,
        mimo_z: Tensor | None = None,
        mimo_o: Tensor | None = None,
        out: Tensor | None = None,
        dtype: torch.dtype,
        operands: torch.dtype | None = None,
        rounds_more: bool = False,
    ) -> None:
        self.dtype, self.operands, self.rounds_more = dtype, operands, rounds_more
        exact = dtype == torch.float64
        self.states = [None if c is None else c.to(dtype if exact else c.dtype, copy=True) for c in caches]
        x = tokens[0]
        self.heads, self.angles, self.dstate = x.shape[-2], tokens[4].shape[-1], tokens[5].shape[-1]
        self.of_one = self.heads // tokens[5].shape[-2]
        self.rank = () if mimo_x is None else (mimo_x.shape[1],)
        shape = (*x.shape[:-2], *(self.rank if mimo_o is None else ()), *x.shape[-2:])
        output = x.new_full(shape, torch.nan) if out is None else out
        self.output = output.to(dtype if exact else output.dtype, copy=True)
        self.tokens = [t.to(dtype) for t in tokens]
        self.z = None if z is None else z.to(dtype)
        self.B_bias, self.C_bias, self.D, *self.mimo = (
            None if t is None else t.to(dtype) for t in (B_bias, C_bias, D, mimo_x, mimo_z, mimo_o)
        )

    def begin(self, slot: int | None) -> list[Head]:
        """The states of a row, of its slot or zero."""
        dim, up = self.tokens[0].shape[-1], self.mimo[0]
        sizes = ((self.angles,), (dim, self.dstate), (*self.rank, self.dstate), (dim,))
        heads = []
        for h in range(self.heads):
            kept = [torch.zeros(size, dtype=self.dtype) for size in sizes]
            if slot is not None:
                kept = [self.of(i, slot)[h].to(self.dtype, copy=True) for i in range(4)]
            heads.append(Head(*kept, self.operands, None if up is None else up[h], self.rounds_more))
        return heads

    def of(self, number: int, slot: int) -> Tensor:
        """A slot of a cache by head."""
        state = self.states[number]
        assert state is not None
        return state[slot].transpose(0, 1) if number == 2 and self.rank else state[slot]

    def read(self, row: list[Head], at: Any) -> None:
        """Read a token with all heads of a row."""
        x, dt, A, trap, angles, B, C = (t[at] for t in self.tokens)
        of_z, of_o = self.mimo[1:]
        for h, head in enumerate(row):
            group = h // self.of_one
            b, c = B[..., group, :], C[..., group, :]
            b = b if self.B_bias is None else b + self.B_bias[h]
            c = c if self.C_bias is None else c + self.C_bias[h]
            y = head.token(x[h], dt[h], A[h], trap[h], angles, b, c)
            gate, weights = (
                None if self.z is None else self.z[at][h],
                (None if t is None else t[h] for t in (of_z, of_o)),
            )
            y = head.finish(y, x[h], None if self.D is None else self.D[h], gate, *weights)
            self.output[at][..., h, :] = y.to(self.output.dtype)

    def keep(self, row: list[Head], slot: int | None) -> None:
        """Store the states of a row."""
        for h, head in enumerate(row):
            for number, value in enumerate((head.angle, head.s, head.k, head.v)):
                if slot is not None and (state := self.states[number]) is not None:
                    self.of(number, slot)[h] = value.to(state.dtype)
