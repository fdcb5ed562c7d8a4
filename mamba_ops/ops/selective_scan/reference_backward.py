"""The backward pass of the selective scan in plain torch: the reference, which runs on any device."""

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import before, carried, chunk_layout, row_count
from mamba_ops.ops._common.decay import finite_rates
from mamba_ops.ops.selective_scan.training import BackwardArguments

PIECE = 16  # tokens that are read one after the other, of all pieces at once


def selective_scan_backward(call: BackwardArguments) -> None:
    """Write the gradients of every input of the selective scan; those of an input that is None are not touched.

    They are computed in float32 at least, and rounded once. Tokens past the last row have zero gradients; a row without
    tokens hands the gradient of its final state on to its initial state.

    With dp the gradient of what is gated, dS the gradient of the state after a token, and kept = exp(A d) s the part of
    that state which comes from the state before, s:

        dS[t] = C[t] dp[t] + exp(A d[t + 1]) dS[t + 1]
        dx = d <B, dS> + D dp;  dd = x <B, dS> + <dS, A kept>;  dB = sum of d x dS;  dC = sum of dp (kept + d x B)
        dA = sum of d dS kept;  dD = sum of dp x

    First what every piece of 16 tokens adds to the state, and to the gradient of the state before it; then, piece by
    piece, the states and the gradients at the ends of all pieces; then all tokens once more, with these. Nothing is
    divided by a decay, so none is too strong.
    """
    compute = torch.promote_types(call.x.dtype, torch.float32)
    (dim, dstate), n, lead = call.A.shape, row_count(call.x, call.cu_seqlens), call.x.dim() - 1
    state_gradient = call.x.new_zeros(n, dim, dstate, dtype=compute)
    if call.grad_final_states is not None:
        state_gradient = call.grad_final_states.to(compute)
    if call.x.numel() == 0 or n == 0:
        of_tokens = (call.grad_x, call.grad_dt, call.grad_B, call.grad_C, call.grad_z)
        for gradient in (*of_tokens, call.grad_A, call.grad_D, call.grad_dt_bias):
            gradient.zero_()
        if call.initial_states is not None:
            call.grad_initial_states.copy_(state_gradient)
        return
    layout = chunk_layout(call.x, PIECE, 1, call.cu_seqlens, None)

    def gather(tokens: Tensor) -> Tensor:
        """An activation as (PIECE, pieces, ...), zero where there is no token."""
        return layout.gather(tokens, layout.inside, compute).transpose(0, 1)

    def of_channels(tokens: Tensor) -> Tensor:
        """B or C as (PIECE, pieces, groups or 1, channels of a group or 1, dstate)."""
        tokens = gather(tokens)
        return (tokens.unsqueeze(2) if tokens.dim() == 3 else tokens).unsqueeze(3)

    def scatter(values: Tensor, gradient: Tensor) -> None:
        """The reverse of gathering; zero where there is a token of no row."""
        gradient.zero_()
        layout.store(gradient, values.transpose(0, 1).reshape(*layout.token.shape, *gradient.shape[lead:]))

    x, raw, b, c = gather(call.x), gather(call.dt), of_channels(call.B), of_channels(call.C)
    if call.dt_bias is not None:
        raw = raw + call.dt_bias.to(compute)
    d = torch.where(raw > 20, raw, torch.log1p(torch.exp(raw))) if call.dt_softplus else raw
    d = torch.where(layout.inside.t().unsqueeze(2), d, 0)
    grad_gated = grad_output = gather(call.grad_output)
    if call.z is not None:
        gate = gather(call.z)
        sigmoid = 1 / (1 + torch.exp(-gate))
        grad_gated = grad_output * (gate * sigmoid)
    u, rates = d * x, finite_rates(call.A.to(compute))
    groups = b.shape[2]

    def per_group(values: Tensor) -> Tensor:
        """A number, or a state, of every channel as (pieces, groups, channels of a group, 1 or dstate)."""
        return values.view(values.shape[0], groups, dim // groups, -1)

    def outer(values: Tensor, entries: Tensor) -> Tensor:
        """The products of a number of every channel with B or C of its group, (pieces, dim, dstate)."""
        return (per_group(values) * entries).flatten(1, 2)

    def decay(t: int) -> Tensor:
        return torch.exp(rates * d[t].unsqueeze(2))

    # What each piece leaves of nothing, and what the state before it gains by the outputs of the piece.
    left = x.new_zeros(x.shape[1], dim, dstate)
    gained = torch.zeros_like(left)
    for t in range(PIECE):
        left = left * decay(t) + outer(u[t], b[t])
    for t in reversed(range(PIECE)):
        gained = (gained + outer(grad_gated[t], c[t])) * decay(t)

    # The state with which each piece begins, and the gradient of the one with which it ends.
    through, from_end = torch.exp(rates * d.sum(0).unsqueeze(2)), layout.of_row[layout.row] - 1 - layout.number
    begins, ends = ((number == 0).view(-1, 1, 1) for number in (layout.number, from_end))
    begun = torch.zeros_like(left)
    if call.initial_states is not None:
        begun = torch.where(begins, call.initial_states.to(compute)[layout.row], 0)
    ended = carried(left + through * begun, through, layout.number, layout.longest)
    begun = begun + before(ended, begins)
    grad_ended = torch.where(ends, state_gradient[layout.row], 0)
    own, from_end = (gained + through * grad_ended).flip(0), from_end.flip(0)
    grad_begun = carried(own, through.flip(0), from_end, layout.longest)
    grad_ended = grad_ended + before(grad_begun, from_end <= 0).flip(0)

    kept, state, read = [], begun, torch.empty_like(x)
    for t in range(PIECE):
        kept.append(state * decay(t))
        state = kept[t] + outer(u[t], b[t])
        read[t] = (per_group(state) * c[t]).sum(-1).flatten(1)
    grad_u, grad_d, grad_A = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(left)
    grad_B, grad_C = (x.new_empty(*b.shape[:3], dstate) for _ in range(2))
    grad_state = grad_ended
    for t in reversed(range(PIECE)):
        grad_state = grad_state + outer(grad_gated[t], c[t])
        grad_exponent = grad_state * kept[t]
        grad_u[t] = (per_group(grad_state) * b[t]).sum(-1).flatten(1)
        grad_d[t] = (grad_exponent * rates).sum(-1)
        grad_A += grad_exponent * d[t].unsqueeze(2)
        grad_B[t] = (per_group(u[t]) * per_group(grad_state)).sum(2)
        grad_C[t] = (per_group(grad_gated[t]) * per_group(kept[t] + outer(u[t], b[t]))).sum(2)
        grad_state = grad_state * decay(t)

    grad_x, grad_d = d * grad_u, grad_d + x * grad_u
    if call.dt_softplus:
        grad_d = torch.where(raw > 20, grad_d, grad_d / (1 + torch.exp(-raw)))
    grad_d = torch.where(layout.inside.t().unsqueeze(2), grad_d, 0)
    if call.D is not None:
        read = read + call.D.to(compute) * x
        grad_x = grad_x + call.D.to(compute) * grad_gated
        call.grad_D.copy_((grad_gated * x).sum((0, 1)))
    if call.z is not None:
        scatter(grad_output * read * (sigmoid * (1 + gate * (1 - sigmoid))), call.grad_z)
    if call.dt_bias is not None:
        call.grad_dt_bias.copy_(grad_d.sum((0, 1)))
    if call.initial_states is not None:
        first = (layout.end - layout.of_row).clamp(max=left.shape[0] - 1)
        begun_with = torch.where((layout.of_row > 0).view(n, 1, 1), grad_begun.flip(0)[first], state_gradient)
        call.grad_initial_states.copy_(begun_with)
    scatter(grad_x, call.grad_x)
    scatter(grad_d, call.grad_dt)
    call.grad_A.copy_(grad_A.sum(0))
    scatter(grad_B, call.grad_B)
    scatter(grad_C, call.grad_C)
