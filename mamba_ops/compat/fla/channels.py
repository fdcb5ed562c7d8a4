"""The gated delta rule with decays, or shares that are written, of single channels of values: no op has it."""

import torch
from torch import Tensor

from mamba_ops.compat.arguments import check_states, floating, upcast
from mamba_ops.ops._common.slots import row_bounds


def by_channel(
    function: str,
    inputs: tuple[Tensor, Tensor, Tensor],
    gates: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    scale: float | None,
    initial: Tensor | None,
    normalise: bool,
    v_first: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return output and last states, read token by token in float32 at least.

    Args:
        function: who was called, for errors.
        inputs: q, k, v.
        gates: g, gk, gv and beta, each None or as in fla, after what gates and sigmoids do.
        scale, initial, normalise, v_first, cu_seqlens: as in fla.
    """
    q, k, v = inputs
    floating(function, q=q, k=k, v=v, initial_state=initial)
    compute, heads = upcast(q), v.shape[2]
    if cu_seqlens is not None and q.shape[0] != 1:
        expected = "1: with cu_seqlens all sequences are packed into one row"
        raise ValueError(f"{function}: q: got a batch of {q.shape[0]}, expected {expected}")
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (v.shape[-1], k.shape[-1]) if v_first else (k.shape[-1], v.shape[-1])
    check_states(function, "initial_state", initial, (rows, heads, *sizes))
    q, k, v = (t.to(compute) for t in (q, k, v))
    if normalise:
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (q, k))
    g, gk, gv, beta = (None if t is None else t.to(compute) for t in gates)
    decay = v.new_zeros(*v.shape[:3], 1, 1)  # of the state, (k_dim, v_dim)
    if g is not None:
        decay = decay + g.unsqueeze(-1).unsqueeze(-1)
    if gk is not None:
        decay = decay + gk.unsqueeze(-1)
    if gv is not None:
        decay = decay + gv.unsqueeze(-2)
    shares = torch.ones_like(v) if beta is None else beta if beta.dim() == v.dim() else beta.unsqueeze(-1)
    if initial is None:
        states = v.new_zeros(rows, heads, k.shape[-1], v.shape[-1])
    else:
        states = (initial.transpose(-1, -2) if v_first else initial).to(compute).clone()
    if cu_seqlens is None:
        row = torch.arange(rows, device=q.device).unsqueeze(1).expand(q.shape[:2])
        inside = torch.ones_like(row, dtype=torch.bool)
    else:
        begins, ends = row_bounds(cu_seqlens, q.shape[1])
        token = torch.arange(q.shape[1], device=q.device)
        row = torch.bucketize(token, ends.contiguous(), right=True).clamp(max=rows - 1).unsqueeze(0)
        inside = (token >= begins[row]) & (token < ends[row])
    read = []
    for t in range(q.shape[1]):
        at, is_own = row[:, t], inside[:, t].view(-1, 1, 1, 1)
        before, key = states[at], k[:, t].unsqueeze(-1)
        state = before * torch.exp(decay[:, t])
        new = shares[:, t] * (v[:, t] - (state * key).sum(-2))
        state = state + key * new.unsqueeze(-2)
        states = states.index_copy(0, at, torch.where(is_own, state, before))
        read.append(torch.where(is_own.squeeze(-1), (state * q[:, t].unsqueeze(-1)).sum(-2), 0))
    out = torch.stack(read, dim=1).to(inputs[2].dtype) if read else torch.zeros_like(inputs[2])
    return out, states.transpose(-1, -2).contiguous() if v_first else states
