"""The model of the benchmarks of swaps: Mamba-2-like layers over bytes, made of the two decode ops."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops import causal_conv1d_update, selective_state_update


class Layer(nn.Module):
    """One layer, which reads a token of every stream; its caches are buffers, and stream i has slot i."""

    conv_state: Tensor
    ssm_state: Tensor

    def __init__(self, streams: int, width: int, *, heads: int, head_dim: int, dstate: int, taps: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.mixed_parts = [inner, dstate, dstate]  # x, B and C, which are convolved together
        self.parts = [inner, sum(self.mixed_parts), heads]  # gate, x with B and C, dt
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.in_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.conv_weight = nn.Parameter(torch.randn(self.parts[1], taps) * taps**-0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.parts[1]))
        self.A_log = nn.Parameter(torch.linspace(1, 16, heads).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.dt_bias = nn.Parameter(torch.linspace(-4, 0, heads))
        self.gated_norm = nn.RMSNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.register_buffer("conv_state", torch.zeros(streams, self.parts[1], taps - 1))
        self.register_buffer("ssm_state", torch.zeros(streams, heads, head_dim, dstate))

    def forward(self, hidden: Tensor) -> Tensor:
        gate, mixed, dt = self.in_proj(self.norm(hidden)).split(self.parts, dim=-1)
        mixed = causal_conv1d_update(mixed, self.conv_state, self.conv_weight, self.conv_bias)
        x, B, C = mixed.split(self.mixed_parts, dim=-1)
        y = selective_state_update(
            self.ssm_state,
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_log.exp(),
            B.unsqueeze(1),
            C.unsqueeze(1),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
        )
        y = self.gated_norm(y.flatten(1) * functional.silu(gate))
        return hidden + cast(Tensor, self.out_proj(y))


class Decoder(nn.Module):
    """A language model over bytes with random weights, its head tied to the embedding."""

    def __init__(
        self, streams: int, *, width: int = 64, depth: int = 2, heads: int = 4, dstate: int = 16, taps: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(
            Layer(streams, width, heads=heads, head_dim=2 * width // heads, dstate=dstate, taps=taps)
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Read one byte of every stream, `(streams,)`; return the logits of the next, `(streams, 256)`."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return functional.linear(self.norm(hidden), self.embedding.weight)

    def forget(self) -> None:
        """Reset the state of every stream."""
        for cache in self.buffers():
            cache.zero_()
