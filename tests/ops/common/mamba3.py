"""Mamba-3's recurrence, written from its formulas: one row and head, one token at a time."""

import math

import torch
from torch import Tensor

from tests.ops.common.exponential import exp


class Head:
    """The states of one row and head, in `dtype`; with `operands` k and q are rounded to that dtype."""

    def __init__(self, angle: Tensor, s: Tensor, k: Tensor, v: Tensor, operands: torch.dtype | None = None) -> None:
        self.angle, self.s, self.k, self.v, self.operands = angle, s, k, v, operands

    def turn(self, vector: Tensor) -> Tensor:
        turned = vector.clone()
        for i, angle in enumerate(self.angle):
            a, b = vector[2 * i], vector[2 * i + 1]
            turned[2 * i] = a * torch.cos(angle) - b * torch.sin(angle)
            turned[2 * i + 1] = a * torch.sin(angle) + b * torch.cos(angle)
        return turned

    def rounded(self, vector: Tensor) -> Tensor:
        return vector if self.operands is None else vector.to(self.operands).to(vector.dtype)

    def token(self, x: Tensor, dt: Tensor, A: Tensor, trap: Tensor, angles: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Read a token; return what the state gives, without skip and gate."""
        angle = self.angle + torch.tanh(angles) * math.pi * dt
        self.angle = angle - 2 * math.pi * torch.round(angle / (2 * math.pi))
        k, q = self.turn(b), self.turn(c)
        early = torch.sigmoid(trap)
        before = (1 - early) * dt * self.v.unsqueeze(1) * self.rounded(self.k)
        self.s = exp((A * dt).clamp(max=0)) * (self.s + before) + early * dt * x.unsqueeze(1) * self.rounded(k)
        self.k, self.v = k, x
        return self.s @ self.rounded(q)
