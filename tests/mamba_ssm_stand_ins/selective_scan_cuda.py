"""A stand-in for mamba_ssm's extension module `selective_scan_cuda`, on CPU tensors.

It is not mamba_ssm's kernel: it has its signature, holds the arguments to what the sources of 2.3.2 ask of them,
returns what they return, and computes in a loop of its own.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    batch, dim, length = u.shape
    dstate = A.shape[1]
    assert u.dtype in FLOATS
    assert A.dtype == torch.float32
    assert tuple(A.shape) == (dim, dstate)
    assert dstate <= 256
    for tensor in (delta, z):
        assert tensor is None or (tensor.dtype == u.dtype and tensor.shape == u.shape)
    for tensor in (u, delta, B, C, z):
        assert tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    groups = B.shape[1]
    for tensor in (B, C):
        assert tensor.dtype == u.dtype
        assert tuple(tensor.shape) == (batch, groups, dstate, length)
    for weight in (D, delta_bias):
        assert weight is None or (weight.dtype == torch.float32 and weight.shape == (dim,) and weight.stride(0) == 1)
    assert dim % groups == 0

    chunk = 2048
    states = torch.full((batch, dim, -(-length // chunk), 2 * dstate), torch.nan)
    out = torch.empty_like(delta)
    gated = None if z is None else torch.empty_like(z)
    s = torch.zeros(batch, dim, dstate)
    for t in range(length):
        d = delta[:, :, t].float()
        if delta_bias is not None:
            d = d + delta_bias
        if delta_softplus:
            d = torch.where(d <= 20, torch.log1p(torch.exp(d)), d)
        b, c = (m[:, :, :, t].float().repeat_interleave(dim // groups, 1) for m in (B, C))
        s = s * torch.exp(d.unsqueeze(2) * A) + (d * u[:, :, t].float()).unsqueeze(2) * b
        y = (s * c).sum(2)
        if D is not None:
            y = y + D * u[:, :, t].float()
        out[:, :, t] = y.to(out.dtype)
        if z is not None and gated is not None:
            gate = z[:, :, t].float()
            gated[:, :, t] = (y * gate / (1 + torch.exp(-gate))).to(out.dtype)
        if (t + 1) % chunk == 0 or t == length - 1:
            states[:, :, t // chunk, 1::2] = s
    return [out, states] if gated is None else [out, states, gated]
