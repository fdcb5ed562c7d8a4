"""The gradients of selective_scan: autograd through its recurrence, written row by row, token by token."""

from itertools import pairwise

import torch
from torch import Tensor

from tests.ops.common.exponential import exp


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (output, final states), in the dtype of the arguments, which is one; for autograd to differentiate."""
    dim, dstate = A.shape
    if cu_seqlens is None:
        rows = [[(row, t) for t in range(x.shape[1])] for row in range(x.shape[0])]
    else:
        rows = [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    outputs = {}
    finals = []
    for row, tokens in enumerate(rows):
        s = x.new_zeros(dim, dstate) if initial_states is None else initial_states[row]
        for at in tokens:
            d = dt[at] if dt_bias is None else dt[at] + dt_bias
            if dt_softplus:
                d = torch.where(d > 20, d, torch.log1p(torch.exp(d.clamp(max=20))))
            b, c = (t[at].reshape(-1, dstate).repeat_interleave(dim // (t[at].numel() // dstate), 0) for t in (B, C))
            s = s * exp(A * d.unsqueeze(1)) + d.unsqueeze(1) * b * x[at].unsqueeze(1)
            y = (s * c).sum(1)
            if D is not None:
                y = y + D * x[at]
            if z is not None:
                y = y * (z[at] * torch.sigmoid(z[at]))
            outputs[at] = y
        finals.append(s)
    places = [(t,) for t in range(x.shape[0])] if cu_seqlens is not None else [at for tokens in rows for at in tokens]
    nothing = x.new_zeros(dim)
    y = torch.stack([outputs.get(at, nothing) for at in places]).view(x.shape) if places else x.new_zeros(x.shape)
    return y, torch.stack(finals)
