"""The attention of mamba_ssm's hybrids, over torch's scaled_dot_product_attention."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from mamba_ops.compat.arguments import only
from mamba_ops.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ops.compat.mamba_ssm.caches import depthwise


class HasPositions(Protocol):
    """What attention asks of mamba_ssm's InferenceParams."""

    max_seqlen: int
    seqlen_offset: int
    batch_size_offset: int
    key_value_memory_dict: dict[int, Any]
    lengths_per_sample: Tensor | None


class Rotary(nn.Module):
    """Rotates the first `dim` channels of heads by their tokens' positions."""

    def __init__(self, dim: int, base: float, interleaved: bool, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        self.register_buffer("inv_freq", base**-steps, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `(batch, length, heads, head_dim)` at `positions`, `(length,)` or `(batch, length)`."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq  # type: ignore[operator]
        angles = (angles if positions.dim() == 2 else angles.unsqueeze(0)).unsqueeze(2)
        cos, sin = torch.cos(angles), torch.sin(angles)
        turned, rest = x[..., : self.dim].float(), x[..., self.dim :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, dim=-1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)


class MHA(nn.Module):
    """Self-attention with mamba_ssm's constructor: a gated MLP, a short convolution and rotary positions beside it.

    Unlike in the original the convolution's state holds its inputs, so that decoding goes on as a whole call does.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        mlp_dim: int = 0,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        d_conv: int = 0,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.layer_idx, self.d_conv, self.softmax_scale = embed_dim, layer_idx, d_conv, softmax_scale
        self.causal, self.rotary_emb_dim, self.num_heads = causal, rotary_emb_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv or (head_dim is None and embed_dim % num_heads):
            got = f"{num_heads} heads and {self.num_heads_kv} of keys and values, of {embed_dim} channels"
            raise ValueError(f"MHA: num_heads: got {got}, expected multiples")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.mlp_dim = -(-mlp_dim // 256) * 256
        qkv_dim = self.head_dim * (num_heads + 2 * self.num_heads_kv)
        if rotary_emb_dim > 0:
            self.rotary_emb = Rotary(rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, device)
        self.in_proj = nn.Linear(embed_dim, qkv_dim + self.mlp_dim, bias=qkv_proj_bias, **new)
        if d_conv > 0:
            self.conv1d = depthwise(qkv_dim, d_conv, True, **new)
        self.out_proj = nn.Linear(self.head_dim * num_heads + self.mlp_dim // 2, embed_dim, bias=out_proj_bias, **new)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """Return room for keys and values, `(batch, max_seqlen, 2, kv heads, head_dim)`, and a convolution's state."""
        weight = self.out_proj.weight
        new: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype if dtype is None else dtype}
        conv_state = None
        if self.d_conv > 0:
            conv_state = torch.zeros(batch_size, self.conv1d.weight.shape[0], self.d_conv, **new)
        return torch.zeros(batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim, **new), conv_state

    def forward(self, x: Tensor, inference_params: HasPositions | None = None) -> Tensor:
        """Attend over `(batch, length, embed_dim)`, and over what `inference_params` keeps of tokens before."""
        cache = self._cache(x, inference_params)
        qkv, mlp = self.in_proj(x).split([self.in_proj.out_features - self.mlp_dim, self.mlp_dim], dim=-1)
        if self.d_conv > 0:
            qkv = self._convolved(qkv, cache[1], inference_params is not None and inference_params.seqlen_offset > 0)
        q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).split(
            [self.num_heads, self.num_heads_kv, self.num_heads_kv], dim=2
        )
        positions = self._positions(x, inference_params)
        if self.rotary_emb_dim > 0:
            q, k = self.rotary_emb(q, positions), self.rotary_emb(k, positions)
        seen = None
        if inference_params is not None:
            k, v, seen = self._kept(k, v, cache[0], positions, inference_params)
        y = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=seen,
            is_causal=self.causal and seen is None,
            scale=self.softmax_scale,
            enable_gqa=self.num_heads != self.num_heads_kv,
        )
        y = y.transpose(1, 2).flatten(2)
        if self.mlp_dim:
            up, gate = mlp.chunk(2, dim=-1)
            y = torch.cat((y, up * silu(gate)), dim=-1)
        out: Tensor = self.out_proj(y)
        return out

    def _cache(self, x: Tensor, inference_params: HasPositions | None) -> tuple[Any, Any]:
        if inference_params is None:
            return None, None
        if self.layer_idx is None:
            raise ValueError(
                "MHA: layer_idx: got None, expected the number under which inference_params keeps its cache"
            )
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(x.shape[0], inference_params.max_seqlen, x.dtype)
        kv, conv_state = caches[self.layer_idx]
        begin = inference_params.batch_size_offset
        return kv[begin : begin + x.shape[0]], conv_state

    def _positions(self, x: Tensor, inference_params: HasPositions | None) -> Tensor:
        """Return the positions of the tokens, `(length,)`; of a captured step, which reads them, `(batch, length)`."""
        steps = torch.arange(x.shape[1], device=x.device)
        if inference_params is None or inference_params.seqlen_offset == 0:
            return steps
        if inference_params.lengths_per_sample is None:
            return steps + inference_params.seqlen_offset
        return inference_params.lengths_per_sample[: x.shape[0]].long().unsqueeze(1) + steps

    def _kept(
        self, k: Tensor, v: Tensor, cache: Tensor, positions: Tensor, inference_params: HasPositions
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store keys and values; return all so far, and which of them each token sees."""
        both = torch.stack((k, v), dim=2).to(cache.dtype)
        if positions.dim() == 2:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
            cache[rows, positions] = both
        else:
            begin = inference_params.seqlen_offset
            end = begin + k.shape[1]
            if end > cache.shape[1]:
                raise ValueError(f"MHA: x: got tokens up to {end}, expected at most {cache.shape[1]}, max_seqlen")
            cache[:, begin:end] = both
            if begin == 0:
                return k, v, None
            cache = cache[:, :end]
        places = torch.arange(cache.shape[1], device=k.device)
        last = positions if self.causal else positions[..., -1:].expand_as(positions)
        seen = places <= last.unsqueeze(-1)
        keys, values = cache.to(k.dtype).unbind(2)
        return keys, values, seen.unsqueeze(1) if seen.dim() == 3 else seen

    def _convolved(self, qkv: Tensor, conv_state: Tensor | None, continues: bool) -> Tensor:
        weight, bias, inputs = self.conv1d.weight.squeeze(1), self.conv1d.bias, qkv.transpose(1, 2)
        if conv_state is not None and continues:
            return causal_conv1d_update(inputs, conv_state, weight, bias).transpose(1, 2)
        if conv_state is not None:
            with torch.no_grad():
                conv_state.copy_(torch.nn.functional.pad(inputs, (self.d_conv, 0))[..., -self.d_conv :])
        return only(causal_conv1d_fn(inputs, weight, bias)).transpose(1, 2)
