"""The plain-torch gradients of mamba_chunk_scan, which run on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import ChunkLayout, before, carried, chunk_layout, row_count
from mamba_ops.ops._common.decay import finite_rates, log_decay_between
from mamba_ops.ops._common.delta_rule_update import sigmoid
from mamba_ops.ops.mamba_chunk_scan.training import BackwardArguments


def mamba_chunk_scan_backward(call: BackwardArguments) -> None:
    """Recompute decays, products and states piece by piece; then carry the states' gradients from the last piece on.

    The gradient of a step's decay adds only what reaches past that step, and never takes one sum from another: it is
    right where a token forgets everything before it.
    """
    heads, dim, dstate = *call.x.shape[-2:], call.B.shape[-1]
    n, compute = row_count(call.x, call.cu_seqlens), torch.promote_types(call.x.dtype, torch.float32)
    for name in BackwardArguments._fields[BackwardArguments._fields.index("grad_x") :]:
        getattr(call, name).zero_()  # of tokens that are in no row, and of inputs that have no token
    final, initial = (None if t is None else t.to(compute) for t in (call.grad_final_states, call.initial_states))
    if n == 0:
        return
    if call.x.numel() == 0:
        if initial is not None and final is not None:
            call.grad_initial_states.copy_(final)
        return

    size = call.chunk_size
    while size % 2 == 0 and size * size > dim * dstate:
        size //= 2
    layout = chunk_layout(call.x, size, 1, call.cu_seqlens, None)
    is_first, is_last = layout.number == 0, layout.number == layout.of_row[layout.row] - 1

    def gather(tokens: Tensor) -> Tensor:
        """An activation by piece and head, or group, (pieces, heads, size, ...)."""
        return layout.gather(tokens, layout.inside, compute).transpose(1, 2)

    def by_head(tensor: Tensor) -> Tensor:
        """What groups have, for each of their heads."""
        return tensor.repeat_interleave(heads // tensor.shape[1], 1)

    # The step sizes, and all decays: from before the piece, to its end, over it, and from token to token.
    x, grad, B, C = gather(call.x), gather(call.grad_output), by_head(gather(call.B)), by_head(gather(call.C))
    raw = gather(call.dt)
    if call.dt_bias is not None:
        raw = raw + call.dt_bias.to(compute).unsqueeze(1)
    unlimited = torch.where(raw > 20, raw, torch.log1p(torch.exp(raw))) if call.dt_softplus else raw
    inside = layout.inside.unsqueeze(1)
    d = torch.where(inside, unlimited.clamp(call.dt_min, call.dt_max), 0)
    rate = finite_rates(call.A.to(compute)).unsqueeze(1)
    a = d * rate
    to_end = a.flip(-1).cumsum(-1).flip(-1)
    begin, whole = a.cumsum(-1).exp().unsqueeze(-1), to_end[..., :1].exp().unsqueeze(-1)
    end = torch.cat((to_end[..., 1:], torch.zeros_like(to_end[..., :1])), -1).exp().unsqueeze(-1)
    lower = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    between = log_decay_between(a).exp()

    # States before the pieces, and what the gate needs of the outputs.
    u, products = x * d.unsqueeze(-1), C @ B.transpose(-1, -2)
    begins = torch.zeros_like(x[..., :1, :1]).expand(-1, -1, dim, dstate)
    if initial is not None:
        begins = torch.where(is_first.view(-1, 1, 1, 1), initial[layout.row], 0)
    own = (u * end).transpose(-1, -2) @ B + whole * begins
    begun = before(carried(own, whole, layout.number, layout.longest), is_first) + begins
    skip = None if call.D is None else call.D.to(compute).view(heads, 1, -1)
    if call.z is not None:
        z = gather(call.z)
        y = begin * (C @ begun.transpose(-1, -2)) + (between * products) @ u
        y = y if skip is None else y + skip * x
        opened = sigmoid(z)
        _store(layout, call.grad_z, grad * y * opened * (1 + z * (1 - opened)))
        grad = grad * z * opened

    # The gradients of the states before and after the pieces, as the recurrence carries them back.
    last = torch.zeros_like(begun)
    if final is not None:
        last = torch.where(is_last.view(-1, 1, 1, 1), final[layout.row], 0)
    own = (grad * begin).transpose(-1, -2) @ C + whole * last
    from_end = (layout.of_row[layout.row] - 1 - layout.number).flip(0)
    grad_begun = carried(own.flip(0), whole.flip(0), from_end, layout.longest).flip(0)
    grad_after = before(grad_begun.flip(0), from_end <= 0).flip(0) + last

    pairs = grad @ u.transpose(-1, -2) * between
    ends = B @ grad_after.transpose(-1, -2) * end
    read = grad @ begun * begin
    grad_u = (between * products).transpose(-1, -2) @ grad + ends
    _store(layout, call.grad_B, _by_group(pairs.transpose(-1, -2) @ C + u @ grad_after * end, call.B.shape[-2]))
    _store(layout, call.grad_C, _by_group(pairs @ B + read, call.C.shape[-2]))

    # The gradient of a step's decay: of all that reaches past the step.
    reach = _earlier((pairs * products).tril(-1)).mul(lower).sum(-2)
    reach += (read * C).sum(-1).flip(-1).cumsum(-1).flip(-1) + _earlier((ends * u).sum(-1))
    reach += whole.squeeze(-1) * (grad_after * begun).sum((-1, -2)).unsqueeze(-1)

    grad_x, grad_d = grad_u * d.unsqueeze(-1), (x * grad_u).sum(-1) + rate * reach
    if skip is not None and call.D is not None:
        grad_x = grad_x + skip * grad
        call.grad_D.copy_((grad * x).sum((0, 2)) if call.D.dim() == 2 else (grad * x).sum((0, 2, 3)))
    _store(layout, call.grad_x, grad_x)
    call.grad_A.copy_((d * reach).sum((0, 2)))
    is_free = inside & (unlimited >= call.dt_min) & (unlimited <= call.dt_max)
    grad_dt = torch.where(is_free, grad_d, 0)
    if call.dt_softplus:
        grad_dt = torch.where(raw > 20, grad_dt, grad_dt * sigmoid(raw))
    _store(layout, call.grad_dt, grad_dt)
    if call.dt_bias is not None:
        call.grad_dt_bias.copy_(grad_dt.sum((0, 2)))
    if initial is not None:
        has_tokens = (layout.of_row > 0).view(-1, 1, 1, 1)
        untouched = torch.zeros_like(initial) if final is None else final
        first = (layout.end - layout.of_row).clamp(max=layout.row.shape[0] - 1)
        call.grad_initial_states.copy_(torch.where(has_tokens, grad_begun[first], untouched))


def _earlier(values: Tensor) -> Tensor:
    """The sums of all values before each one, along the last axis."""
    return torch.cat((torch.zeros_like(values[..., :1]), values[..., :-1].cumsum(-1)), -1)


def _by_group(by_head: Tensor, groups: int) -> Tensor:
    """The sums over the heads of each group."""
    count, heads, size, entries = by_head.shape
    return by_head.view(count, groups, heads // groups, size, entries).sum(2)


def _store(layout: ChunkLayout, target: Tensor, values: Tensor) -> None:
    layout.store(target, values.transpose(1, 2))
