"""A second backend for the demo, because a CPU has one of its own: both ops, row after row.

It is added as anybody would add theirs, and says what it does not take.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops import causal_conv1d_update, selective_state_update
from mamba_ops.registry import Backend

ROWS = "takes one token a row, and row i in slot i"


@contextmanager
def loop_backend() -> Iterator[None]:
    """Within the block, there is a backend `loop`, last in the default order."""
    loop = Backend("loop", devices=None, priority=-10)
    try:
        loop.implements(causal_conv1d_update, unsupported=_why_not_conv)(_causal_conv1d_update)
        loop.implements(selective_state_update, unsupported=_why_not_ssm)(_selective_state_update)
        yield
    finally:
        loop.remove()


def _why_not_conv(
    x: Tensor, slots: Tensor | None, cu_seqlens: Tensor | None, num_accepted_tokens: Tensor | None
) -> str | None:
    one_token = x.dim() == 2 or x.shape[1] == 1
    plain = slots is None and cu_seqlens is None and num_accepted_tokens is None and one_token
    return None if plain else ROWS


def _causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    silu: bool = True,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    history = conv_state[:, :, : weight.shape[1] - 1]
    if x.dim() == 3:
        x, output = x.squeeze(1), output.squeeze(1)
    for token, past, result in zip(x, history, output, strict=False):  # there may be more slots than rows
        window = torch.cat((past.float(), token.float().unsqueeze(1)), dim=1)
        y = (window * weight).sum(1)
        if bias is not None:
            y = y + bias
        result.copy_(functional.silu(y) if silu else y)
        past.copy_(window[:, 1:])


def _why_not_ssm(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
) -> str | None:
    tables = slots, write_slots, cu_seqlens, num_accepted_tokens
    if any(t is not None for t in tables) or x.dim() == state.dim():
        return ROWS
    if state.dim() == 3 or dt.dim() == 3 or any(t is not None and t.dim() > 1 for t in (A, D, dt_bias)):
        return "takes Mamba-2 with one dt, A and D for each head"
    return None if z is None else "takes no z"


def _selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    null_slot: int = -1,
    rounding_seed: Tensor | None = None,
    philox_rounds: int = 0,
    output: Tensor,
) -> None:
    heads_per_group = x.shape[1] // B.shape[1]
    for s, u, d, b, c, result in zip(state, x.float(), dt.float(), B.float(), C.float(), output, strict=False):
        if dt_bias is not None:
            d = d + dt_bias
        if dt_softplus:
            d = functional.softplus(d)
        b, c = (m.repeat_interleave(heads_per_group, dim=0) for m in (b, c))
        decay = torch.exp(A * d).view(-1, 1, 1)
        advanced = s * decay + torch.einsum("h,hp,hn->hpn", d, u, b)
        y = torch.einsum("hpn,hn->hp", advanced, c)
        result.copy_(y if D is None else y + D.unsqueeze(1) * u)
        s.copy_(advanced)
