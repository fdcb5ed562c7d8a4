"""Norms that models may have, and what runs when one is called, for the tests of use_mamba_ops."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import mamba_ops

SIZE = 24
FORCED = {"rms_norm": "triton"}
OP = "mamba_ops::rms_norm"


class Norm(nn.Module):
    """A plain one, and the base of those below."""

    def __init__(self, size: int = SIZE, eps: float = 1e-5, **settings: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.eps = eps
        vars(self).update(settings)

    def normed(self, x: Tensor, groups: int = 1) -> Tensor:
        parts = x.float().unflatten(-1, (groups, -1))
        return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * self.weight).to(x.dtype)


class Inheriting(Norm):
    """With its base's forward."""


class Gated(Norm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return (self.normed(x if gate is None else x * silu(gate.float())) * self.weight).to(x.dtype)


class OfGroups(Norm):
    def forward(self, hidden_states: Tensor, z: Tensor) -> Tensor:
        groups = hidden_states.shape[-1] // self.group_size
        return (self.normed(hidden_states * silu(z.float()), groups) * self.weight).to(hidden_states.dtype)


class GatedAfter(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        act = torch.sigmoid if self.activation == "sigmoid" else silu
        return (self.normed(x, self.n_groups) * self.weight * act(gate.float())).to(x.dtype)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.epsilon = 1e-6
        self.register_buffer("weight", torch.randn(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (SIZE,), self.weight, self.epsilon)


class Weightless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Around(Norm):
    """Calls its base's forward, and does more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class OnePlus(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * (1 + self.weight)).to(x.dtype)


class WithMean(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x - x.mean(-1, keepdim=True)) * self.weight).to(x.dtype)


class EpsOutside(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight).to(x.dtype)


class Clamped(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x.clamp(max=20)) * self.weight).to(x.dtype)


class OverTokens(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Tanh(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return (self.normed(x) * self.weight * gate.tanh()).to(x.dtype)


class Residual(Norm):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return (self.normed(x + residual) * self.weight).to(x.dtype)


class Dropping(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout((self.normed(x) * self.weight).to(x.dtype), 0.5, self.training)


class Wide(Norm):
    """Its output is always float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x) * self.weight.float()


class Configured(Norm):
    """Reads what nobody sees."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * self.weight * self.config["scale"]).to(x.dtype)


class AloneFlat(Norm):
    """Drops the axis of a single token."""

    def forward(self, x: Tensor) -> Tensor:
        out = (self.normed(x) * self.weight).to(x.dtype)
        return out.squeeze(1) if x.dim() == 3 else out


class OfRows(Norm):
    """Takes two axes, or three."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() > 3:
            raise ValueError("four axes")
        return (self.normed(x) * self.weight).to(x.dtype)


class Pair(Norm):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.normed(x) * self.weight).to(x.dtype), x


class Raising(Norm):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError


ONE_CALL: dict[str, tuple[Any, int]] = {  # how to make one, and how many tensors it takes
    "plain": (Norm, 1),
    "inherited": (Inheriting, 1),
    "gated": (Gated, 2),
    "gated, no gate": (Gated, 1),
    "by the size of groups": (lambda: OfGroups(group_size=8), 2),
    "by groups": (lambda: GatedAfter(n_groups=3, activation="silu"), 2),
    "sigmoid": (lambda: GatedAfter(n_groups=1, activation="sigmoid"), 2),
    "of three axes": (OfRows, 1),
    "a buffer": (Buffered, 1),
    "no weight": (Weightless, 1),
}
OWN: dict[str, tuple[Any, int]] = {
    "a forward around another": (Around, 1),
    "1 + weight": (OnePlus, 1),
    "a mean": (WithMean, 1),
    "eps outside": (EpsOutside, 1),
    "clamped": (Clamped, 1),
    "over tokens": (OverTokens, 1),
    "tanh": (Tanh, 2),
    "a residual": (Residual, 2),
    "dropout": (Dropping, 1),
    "of another dtype": (Wide, 1),
    "no axis of a single token": (AloneFlat, 1),
    "a config": (lambda: Configured(config={"scale": 1.0}), 1),
    "two outputs": (Pair, 1),
    "a large eps": (lambda: Norm(eps=1.0), 1),
    "a scale in its code": (type("Scaled", (Norm,), {"forward": lambda self, x: 1.01 * Norm.forward(self, x)}), 1),
}


def inputs(device: torch.device, count: int) -> list[Tensor]:
    return [torch.randn(2, 3, SIZE, device=device) for _ in range(count)]


def runs(norm: Any, *given: Any, **named: Any) -> tuple[Any, list[str]]:
    """What a norm gives where the kernel is asked for, and the ops that ran."""
    with mamba_ops.use_backend(**FORCED), mamba_ops.record_selections() as record:
        return norm(*given, **named), [selection.op for selection in record]
