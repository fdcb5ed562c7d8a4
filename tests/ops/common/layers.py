"""The layers written from their formulas: one sequence, one token at a time, with that sequence's state."""

from typing import Any

import torch
from torch import Tensor

from tests.ops.chunk_gated_delta_rule.oracle import chunk_step
from tests.ops.chunk_kda.oracle import chunk_step as chunk_step_by_channel
from tests.ops.common.exponential import exp
from tests.ops.common.mamba3 import Head
from tests.ops.common.mixing import softplus


class LayerOracle:
    """What a layer is made of, in `dtype`; `window` are the convolution's last inputs and `state` the recurrence's."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.weights = {name: p.detach().cpu().to(dtype) for name, p in layer.state_dict().items()}
        window, *states = layer.empty_caches(1)
        self.window = torch.zeros(window.shape[:0:-1], dtype=dtype)  # where there is one
        self.state = torch.zeros(states[0].shape[1:], dtype=dtype) if states else None

    def token(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def read(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.token(h) for h in hidden.cpu().to(self.dtype)])

    def caches(self) -> dict[str, Tensor]:
        """What the layer's caches hold of the sequence, by name."""
        found = {"conv_state": self.window.t()}
        return found if self.state is None else {**found, "ssm_state": self.state}

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = self.weights[f"{name}.weight"] @ x
        return y if bias is None else y + bias

    def convolve(self, mixed: Tensor, name: str = "conv1d", *, silu: bool = True) -> Tensor:
        window = torch.cat([self.window, mixed.unsqueeze(0)])
        self.window = window[1:]
        mixed = (window.t() * self.weights[f"{name}.weight"].squeeze(1)).sum(1)
        if f"{name}.bias" in self.weights:
            mixed = mixed + self.weights[f"{name}.bias"]
        return mixed * torch.sigmoid(mixed) if silu else mixed


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt()


class Mamba2Oracle(LayerOracle):
    def token(self, hidden: Tensor) -> Tensor:
        layer, weights = self.layer, self.weights
        gate, mixed, dt = self.linear(hidden, "in_proj").split(layer.projected)
        x, B, C = self.convolve(mixed).split(layer.convolved)
        y = torch.empty(layer.heads, layer.head_dim, dtype=self.dtype)
        for h in range(layer.heads):
            group = slice(h // (layer.heads // layer.groups) * layer.dstate, None)
            b, c = B[group][: layer.dstate], C[group][: layer.dstate]
            u = x[h * layer.head_dim : (h + 1) * layer.head_dim]
            d = softplus(dt[h] + weights["dt_bias"][h]).clamp(layer.dt_min, layer.dt_max)
            decay = exp(-torch.exp(weights["A_log"][h]) * d)
            self.state[h] = self.state[h] * decay + d * u.unsqueeze(1) * b
            y[h] = self.state[h] @ c + weights["D"][h] * u
        y = y.flatten() * gate * torch.sigmoid(gate)
        y = torch.cat([rms(part, layer.norm.eps) for part in y.split(y.numel() // layer.groups)])
        return self.linear(y * weights["norm.weight"], "out_proj")


class MambaOracle(LayerOracle):
    def token(self, hidden: Tensor) -> Tensor:
        layer, weights = self.layer, self.weights
        x, z = self.linear(hidden, "in_proj").split(layer.d_inner)
        x = self.convolve(x)
        parts = self.linear(x, "x_proj").split([layer.dt_rank, layer.dstate, layer.dstate])
        dt, B, C = parts if layer.norms is None else (rms(part, layer.eps) for part in parts)
        if layer.norms == "weighted":
            dt, B, C = (p * weights[f"{n}_layernorm.weight"] for n, p in (("dt", dt), ("b", B), ("c", C)))
        d = softplus(self.linear(dt, "dt_proj")).unsqueeze(1)
        self.state = self.state * exp(-torch.exp(weights["A_log"]) * d) + d * x.unsqueeze(1) * B
        y = self.state @ C + weights["D"] * x
        return self.linear(y * z * torch.sigmoid(z), "out_proj")


class ShortConvOracle(LayerOracle):
    def token(self, hidden: Tensor) -> Tensor:
        B, C, x = self.linear(hidden, "in_proj").chunk(3)
        return self.linear(C * self.convolve(B * x, "conv", silu=False), "out_proj")


class Mamba3Oracle(LayerOracle):
    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        rank = (layer.mimo_rank,) if layer.is_mimo else ()
        sizes = (layer.angles, (layer.head_dim, layer.dstate), (*rank, layer.dstate), layer.head_dim)
        up = self.weights["mimo_x"] if layer.is_mimo else [None] * layer.heads
        self.heads = [Head(*(torch.zeros(size, dtype=dtype) for size in sizes), up=up[h]) for h in range(layer.heads)]

    def caches(self) -> dict[str, Tensor]:
        states = {"angle_state": "angle", "ssm_state": "s", "k_state": "k", "v_state": "v"}
        kept = {name: torch.stack([getattr(head, part) for head in self.heads]) for name, part in states.items()}
        return {**kept, "k_state": kept["k_state"].transpose(0, 1)} if self.layer.is_mimo else kept

    def token(self, hidden: Tensor) -> Tensor:
        layer, weights = self.layer, self.weights
        z, x, B, C, dt, A, trap, angles = self.linear(hidden, "in_proj").split(layer.projected)
        z, x = z.view(layer.heads, -1), x.view(layer.heads, -1)
        B, C = (
            torch.stack([rms(each, 1e-5) for each in t.view(-1, layer.dstate)]) * weights[f"{name}_norm.weight"]
            for name, t in (("B", B), ("C", C))
        )
        outputs = []
        for h, head in enumerate(self.heads):
            group = h // (layer.heads // layer.groups)
            step = softplus(dt[h] + weights["dt_bias"][h])
            rate = -softplus(A[h]).clamp(min=layer.A_floor)
            b, c = B[group :: layer.groups] + weights["B_bias"][h], C[group :: layer.groups] + weights["C_bias"][h]
            b, c = (b, c) if layer.is_mimo else (b[0], c[0])
            y = head.finish(
                head.token(x[h], step, rate, trap[h], angles, b, c), x[h], weights["D"][h], None, None, None
            )
            of_z, of_o = (weights[n][h] if layer.is_mimo else torch.ones(()) for n in ("mimo_z", "mimo_o"))
            if layer.out_norm:
                norm = weights["norm.weight"].view(layer.heads, -1)[h]
                y = torch.stack([rms(each, layer.norm.eps) for each in y.view(-1, layer.head_dim)]) * norm
            gate = z[h] * of_z
            y = y * gate * torch.sigmoid(gate) * of_o
            outputs.append(y.view(-1, layer.head_dim).sum(0))
        return self.linear(torch.cat(outputs), "out_proj")


class GatedDeltaNetOracle(LayerOracle):
    def projected(self, hidden: Tensor) -> list[Tensor]:
        """q and k by key head; v, z, b and a by value head."""
        layer = self.layer
        K, V, Dk, Dv = layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
        if layer.interleaved:
            mine = V // K  # value heads of a key head, whose parts lie together
            qkvz = self.linear(hidden, "in_proj_qkvz").view(K, -1).split([Dk, Dk, mine * Dv, mine * Dv], dim=1)
            ba = self.linear(hidden, "in_proj_ba").view(K, -1).split([mine, mine], dim=1)
            parts = [*qkvz, *ba]
        else:
            qkv = self.linear(hidden, "in_proj_qkv").split([K * Dk, K * Dk, V * Dv])
            parts = [*qkv, *(self.linear(hidden, f"in_proj_{name}") for name in "zba")]
        q, k, v, z, b, a = parts
        return [q.reshape(K, Dk), k.reshape(K, Dk), v.reshape(V, Dv), z.reshape(V, Dv), b.reshape(V), a.reshape(V)]

    def read(self, hidden: Tensor) -> Tensor:
        """In float64 token by token; in float32 in chunks: their equations have other rounding errors."""
        layer, weights = self.layer, self.weights
        parts = [self.convolved(h) for h in hidden.cpu().to(self.dtype)]
        q, k, v, z, b, a = (torch.stack(part) for part in zip(*parts, strict=True))
        y = torch.empty_like(v)
        step = 1 if self.dtype == torch.float64 else 64
        for h in range(layer.num_v_heads):
            head = h // (layer.num_v_heads // layer.num_k_heads)
            g = -torch.exp(weights["A_log"][h]) * softplus(a[:, h] + weights["dt_bias"][h])
            for start in range(0, len(hidden), step):
                at = slice(start, start + step)
                inputs = (q[at, head], k[at, head], v[at, h], g[at], torch.sigmoid(b[at, h]))
                self.state[h], o = chunk_step(self.state[h], *inputs, None, True, self.dtype)
                y[at, h] = torch.stack([rms(row, layer.norm.eps) for row in o])
        y = y * weights["norm.weight"] * z * torch.sigmoid(z)
        return torch.stack([self.linear(row.flatten(), "out_proj") for row in y])

    def convolved(self, hidden: Tensor) -> list[Tensor]:
        """What `projected` returns, q, k and v after the convolution."""
        q, k, v, z, b, a = self.projected(hidden)
        mixed = self.convolve(torch.cat([q.flatten(), k.flatten(), v.flatten()]))
        parts = mixed.split([q.numel(), k.numel(), v.numel()])
        return [*(part.view(t.shape) for part, t in zip(parts, (q, k, v), strict=True)), z, b, a]


class KimiDeltaAttentionOracle(LayerOracle):
    def decays(self, hidden: Tensor) -> Tensor:
        """Their logs, by head and channel."""
        layer, weights, gate = self.layer, self.weights, "forget_gate"
        raw = self.linear(hidden, f"{gate}.f_a_proj") if layer.low_rank else hidden
        raw = self.linear(raw, f"{gate}.f_b_proj" if layer.low_rank else f"{gate}.f_proj")
        raw = (raw + weights[f"{gate}.dt_bias"]).view(layer.num_heads, layer.head_dim)
        rate = torch.exp(weights[f"{gate}.A_log"]).view(-1, 1)
        bound = layer.forget_gate.lower_bound
        return -rate * softplus(raw) if bound is None else bound * torch.sigmoid(rate * raw)

    def read(self, hidden: Tensor) -> Tensor:
        """In float64 token by token; in float32 in chunks: their equations have other rounding errors."""
        layer, hidden = self.layer, hidden.cpu().to(self.dtype)
        shape = (len(hidden), 3, layer.num_heads, layer.head_dim)
        mixed = [torch.cat([self.linear(h, f"{name}_proj") for name in "qkv"]) for h in hidden]
        q, k, v = torch.stack([self.convolve(m) for m in mixed]).view(shape).unbind(1)
        g = torch.stack([self.decays(h) for h in hidden])
        beta = torch.sigmoid(torch.stack([self.linear(h, "b_proj") for h in hidden]))
        y = torch.empty_like(v)
        step = 1 if self.dtype == torch.float64 else 64
        for h in range(layer.num_heads):
            for start in range(0, len(hidden), step):
                at = slice(start, start + step)
                inputs = (t[at, h] for t in (q, k, v, g, beta))
                self.state[h], o = chunk_step_by_channel(self.state[h], *inputs, None, True, self.dtype)
                y[at, h] = torch.stack([rms(row, layer.o_norm.eps) for row in o])
        gates = [self.linear(h, "g_a_proj") if layer.low_rank else h for h in hidden]
        gates = [self.linear(h, "g_b_proj" if layer.low_rank else "g_proj") for h in gates]
        y = y * self.weights["o_norm.weight"] * torch.sigmoid(torch.stack(gates)).view_as(y)
        return torch.stack([self.linear(row.flatten(), "o_proj") for row in y])
