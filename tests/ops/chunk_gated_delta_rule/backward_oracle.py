"""The gradients of chunk_gated_delta_rule: autograd through its recurrence, written row by row, token by token."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.ops.common.exponential import exp, sums_between


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    operands: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (output, final states), in the dtype of the arguments, which is one; for autograd to differentiate.

    With `operands` in chunks of 64 tokens, and what chunked kernels give to matrix units is rounded to that dtype, as
    are the gradients that come back from there.
    """
    heads, v_dim, k_dim = *v.shape[-2:], q.shape[-1]
    if cu_seqlens is None:
        rows = [[(row, t) for t in range(v.shape[1])] for row in range(v.shape[0])]
    else:
        rows = [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    if qk_l2norm:
        q, k = (t / torch.sqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q = q * (k_dim**-0.5 if scale is None else scale)
    q, k = (t.repeat_interleave(heads // t.shape[-2], -2) for t in (q, k))
    outputs = {}
    finals = []
    for row, tokens in enumerate(rows):
        S = v.new_zeros(heads, v_dim, k_dim) if initial_states is None else initial_states[row]
        for start in range(0, 0 if operands is None else len(tokens), 64):
            chunk = tokens[start : start + 64]
            inputs = [torch.stack([t[at] for at in chunk], 1) for t in (q, k, v, g, beta)]  # (heads, tokens, ...)
            steps = [_chunk(S[h], *(t[h] for t in inputs), operands) for h in range(heads)]  # type: ignore[arg-type]
            S = torch.stack([after for after, _ in steps])
            outputs.update(zip(chunk, torch.stack([o for _, o in steps], 1), strict=True))
        for at in tokens if operands is None else []:
            S = S * exp(g[at]).view(-1, 1, 1)
            wrong = v[at] - (S @ k[at].unsqueeze(2)).squeeze(2)
            S = S + beta[at].view(-1, 1, 1) * wrong.unsqueeze(2) * k[at].unsqueeze(1)
            outputs[at] = (S @ q[at].unsqueeze(2)).squeeze(2)
        finals.append(S)
    places = [(t,) for t in range(v.shape[0])] if cu_seqlens is not None else [at for tokens in rows for at in tokens]
    nothing = v.new_zeros(heads, v_dim)
    y = torch.stack([outputs.get(at, nothing) for at in places]).view(v.shape) if places else v.new_zeros(v.shape)
    return y, torch.stack(finals)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def _chunk(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, operands: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One chunk of one head: the new state, (v_dim, k_dim), and the outputs."""

    def rounded(tensor: Tensor) -> Tensor:
        result: Tensor = _Rounded.apply(tensor, operands)
        return result

    q, k = rounded(q), rounded(k)
    between, since = exp(sums_between(g)), exp(torch.cumsum(g, 0)).unsqueeze(1)
    system = ((k @ k.T) * between * beta.unsqueeze(1)).tril(-1)
    inverse = list(torch.eye(len(g), dtype=g.dtype))
    for i in range(1, len(g)):
        inverse[i] = inverse[i] - system[i, :i] @ torch.stack(inverse[:i])
    lacking = rounded((v - since * (k @ rounded(S).T)) * beta.unsqueeze(1))
    new = rounded(rounded(torch.stack(inverse)) @ lacking)
    out = since * (q @ rounded(S).T) + rounded(((q @ k.T) * between).tril()) @ new
    return S * since[-1] + rounded(new * between[-1].unsqueeze(1)).T @ k, out
