"""The scan of Mamba-2 as its paper lists it, `mamba_ssm.modules.ssd_minimal`, over the steps of the chunked scan."""

import torch
from torch import Tensor

from mamba_ops.compat.arguments import States, floating, whole
from mamba_ops.compat.mamba_ssm.chunks import chunk_scan, chunk_state, state_passing
from mamba_ops.registry import answering


@answering
def segsum(x: Tensor) -> Tensor:
    """Return the sums of all segments of `(..., length)`: at [i, j] of x[j + 1] up to x[i], and -inf for j above i."""
    floating("segsum", x=x)
    if not x.dim():
        raise ValueError("segsum: x: got a number, expected a tensor with an axis of tokens")
    length = x.shape[-1]
    seen = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    sums = x.unsqueeze(-1).expand(*x.shape, length).masked_fill(~seen.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~seen, -torch.inf)


@answering
def ssd_minimal_discrete(
    X: Tensor, A: Tensor, B: Tensor, C: Tensor, block_len: int, initial_states: Tensor | None = None
) -> States:
    """Scan sequences whose decays are given token by token; return the output, and the last states.

    Differentiable: all tensors.

    Args:
        X: `(batch, length, heads, dim)`, times the steps.
        A: `(batch, length, heads)`, the log of each token's decay.
        B, C: `(batch, length, heads, dstate)`.
        block_len: tokens per chunk, a divisor of the length.
        initial_states: `(batch, 1, heads, dim, dstate)`.
    """
    name = "ssd_minimal_discrete"
    floating(name, X=X, A=A, B=B, C=C, initial_states=initial_states)
    whole(name, block_len=block_len)
    if X.dim() != 4 or A.shape != X.shape[:3] or X.shape[1] % block_len:
        got = f"shapes {tuple(X.shape)} and {tuple(A.shape)} in chunks of {block_len}"
        raise ValueError(f"{name}: X, A: got {got}, expected (batch, length, heads, dim) without its last axis for A")
    sums = A.unflatten(1, (-1, block_len)).permute(0, 3, 1, 2).cumsum(-1)
    steps = torch.ones_like(sums)
    states = chunk_state(B, X, steps, sums)
    first = None if initial_states is None else initial_states.squeeze(1).flatten(-2)
    before, last = state_passing(states.flatten(-2), sums[..., -1], first)
    size = states.shape[-2:]
    return chunk_scan(B, C, X, steps, sums, before.unflatten(-1, size)), last.unflatten(-1, size)
