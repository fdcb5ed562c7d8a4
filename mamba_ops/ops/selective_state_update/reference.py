"""The plain-torch kernel of selective_state_update: its reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import fixed
from mamba_ops.ops._common.decay import finite_rates
from mamba_ops.ops._common.narrow import read_states, store_states
from mamba_ops.ops._common.slots import padded_rows, store_rows, update_ends
from mamba_ops.ops.selective_state_update.op import Arguments
from mamba_ops.ops.selective_state_update.step import is_step, step


def selective_state_update(call: Arguments) -> None:
    compute = torch.promote_types(call.x.dtype, torch.float32)
    if is_step(call):
        step(call, compute)
        return
    headless, flat = call.ssm_state.dim() == 3, call.x.dim() < call.ssm_state.dim()
    if call.cu_seqlens is not None:
        index, inside = padded_rows(call.cu_seqlens, call.x.shape[0])
    else:
        index, inside = None, call.x.new_ones(call.x.shape[0], 1 if flat else call.x.shape[1], dtype=torch.bool)
    n, length = inside.shape
    if inside.numel() == 0:
        return

    def rows(tokens: Tensor) -> Tensor:
        """An activation as (n, length, heads or groups, ...)."""
        tokens = tokens.unsqueeze(-2) if headless else tokens
        if index is not None:
            tokens = tokens[index]
        elif flat:
            tokens = tokens.unsqueeze(1)
        return tokens.to(compute)

    def weights(weight: Tensor) -> Tensor:
        """A per-head or per-channel parameter as (heads, 1 or dim, ...)."""
        weight = weight.unsqueeze(0) if headless else weight
        return (weight if weight.dim() > 1 else weight.unsqueeze(1)).to(compute)

    # Row i has slot i, and every row has tokens.
    in_order = call.slots is None and call.write_slots is None and index is None
    source, is_active, target, stored = update_ends(
        call.slots,
        call.write_slots,
        call.null_slot,
        call.num_accepted_tokens,
        inside,
        None if in_order else call.ssm_state,
    )

    u, d, b, c = rows(call.x), rows(call.dt), rows(call.B), rows(call.C)
    d = d if d.dim() == u.dim() else d.unsqueeze(-1)
    if call.dt_bias is not None:
        d = d + weights(call.dt_bias)
    if call.dt_softplus:  # not torch's softplus and sigmoid: on CPU their last bits depend on where an element stands
        d = torch.where(d > 20, d, torch.log1p(torch.exp(d)))
    d, b, c = d.unsqueeze(-1), b.unsqueeze(-2), c.unsqueeze(-2)  # (n, length, heads or groups, 1 or dim, 1 or dstate)
    b, c = (m.repeat_interleave(u.shape[2] // m.shape[2], dim=2) for m in (b, c))
    a = finite_rates(weights(call.A))
    a = a if a.dim() == 3 else a.unsqueeze(-1)

    def as_kept(s: Tensor) -> Tensor:
        """States by channel, as the cache has them."""
        return s.squeeze(1) if headless else s

    # Rows in order are a view: a cache of the dtype that is computed in then advances where it is.
    s = read_states(call, slice(n) if in_order else torch.where(is_active, source, 0), compute)
    s = s.unsqueeze(1) if headless else s
    sums = []
    for t in range(fixed(length)):
        decay, written = torch.exp(a * d[:, t]), (d[:, t] * u[:, t].unsqueeze(-1)) * b[:, t]
        if index is None:
            s = s.mul_(decay).add_(written)
        else:
            s = torch.where(inside[:, t].view(n, 1, 1, 1), s * decay + written, s)
        sums.append(torch.mul(s, c[:, t], out=written).sum(-1))
        if call.num_accepted_tokens is not None and t < target.shape[1]:
            store_states(call, target[:, t], as_kept(s), stored[:, t])
    if in_order and call.ssm_state.dtype != compute:
        store_states(call, source, as_kept(s), None)
    elif not in_order and call.num_accepted_tokens is None:
        store_states(call, target[:, 0], as_kept(s), stored[:, 0])

    y = torch.stack(sums, dim=1)
    if call.D is not None:
        y = y + weights(call.D) * u
    if call.z is not None:
        gate = rows(call.z)
        y = y * (gate / (1 + torch.exp(-gate)))
    y = (y if in_order else torch.where(is_active.view(n, 1, 1, 1), y, 0)).to(call.output.dtype)
    if index is None:
        call.output.copy_(y.view(call.output.shape))
    else:
        store_rows(call.output, index.flatten(), y.view(-1, *call.output.shape[1:]), inside.flatten())
