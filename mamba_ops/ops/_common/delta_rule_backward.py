"""The backward pass of the gated delta rules in plain torch, whatever decays what."""

from typing import Protocol

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import chunk_layout, fixed, row_count
from mamba_ops.ops._common.delta_rule import CHUNK, EPS, BackwardArguments
from mamba_ops.ops._common.delta_rule_reference import Decays, inverse, normalised
from mamba_ops.ops._common.slots import store_rows


class DifferentiableDecays(Decays, Protocol):
    """Decays whose products have gradients."""

    def gradients(
        self, queries: Tensor, keys: Tensor, grad_of_keys: Tensor, grad_of_queries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries and keys, by head of v, and of the logs, (pieces, v_heads, CHUNK, ...).

        Given those of both products, which are zero where the products are.
        """


def _through_norm(x: Tensor, unit: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x, given that of x / sqrt(sum(x^2) + EPS)."""
    factor = torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
    return factor * (grad - unit * (unit * grad).sum(-1, keepdim=True))


def write_gradients(call: BackwardArguments, decays_of: type[DifferentiableDecays]) -> None:
    """Write the gradients of every input; that of an initial state that is None is not touched.

    They are computed in float32 at least, and rounded once. Tokens past the last row have zero gradients; a row without
    tokens hands the gradient of its final state on to its initial state.

    In a chunk, with G the sum of g up to a token, L[i, j] = exp(G[i] - G[j]) and S the state before it, tokens write
    N = T (beta R) where R = V - exp(G) K S^T and T = (I + A)^-1, and their output is exp(G) Q S^T + P N, where
    P = tril(Q K^T L). With dS the gradient of the state after the chunk:

        dN = P^T dO + (exp(G_last - G) K) dS^T;  Y = T^T dN;  dV = beta Y;  dA = -tril(Y N^T, -1)
        gradient of S = exp(G_last) dS + dO^T (exp(G) Q) - (beta Y)^T (exp(G) K)

    and those of Q, K, beta and of the decays follow from dP = dO N^T, from dA, and from the products with S and dS. The
    gradient of g[t] is the sum of all that is multiplied by exp(g[t]): pairs of tokens with t between them, what
    tokens from t on read of S, what those before t leave in the state after. No two large sums are subtracted from each
    other, so it is zero where a decay is.
    """
    compute = torch.promote_types(call.q.dtype, torch.float32)
    (k_heads, k_dim), (v_heads, v_dim) = call.q.shape[-2:], call.v.shape[-2:]
    n, lead, per_key = row_count(call.v, call.cu_seqlens), call.v.dim() - 2, v_heads // k_heads
    grad_state = call.v.new_zeros(n, v_heads, v_dim, k_dim, dtype=compute)
    if call.grad_final_states is not None:
        grad_state = call.grad_final_states.to(compute)
    if call.v.numel() == 0 or n == 0:
        for gradient in (call.grad_q, call.grad_k, call.grad_v, call.grad_g, call.grad_beta):
            gradient.zero_()
        if call.initial_states is not None:
            call.grad_initial_states.copy_(grad_state)
        return
    layout = chunk_layout(call.v, CHUNK, 1, call.cu_seqlens, None)

    def gather(tokens: Tensor) -> Tensor:
        """An activation as (pieces, heads, CHUNK, ...), zero where there is no token."""
        return layout.gather(tokens, layout.inside, compute).transpose(1, 2)

    def scatter(values: Tensor, gradient: Tensor) -> None:
        """The reverse of gathering; zero where there is a token of no row."""
        gradient.zero_()
        layout.store(gradient, values.transpose(1, 2).reshape(*layout.token.shape, *gradient.shape[lead:]))

    def of_keys(valued: Tensor) -> Tensor:
        """The sums over the heads of v that a head of q and k has."""
        summed: Tensor = valued.unflatten(1, (k_heads, -1)).sum(2)
        return summed

    def of_decays(by_channel: Tensor) -> Tensor:
        """What belongs to the channels of keys, for the decays: theirs, or one of all."""
        return by_channel if decays.since.shape[3] == k_dim else by_channel.sum(3, keepdim=True)

    raw_q, raw_k, values, strength = gather(call.q), gather(call.k), gather(call.v), gather(call.beta).unsqueeze(3)
    grad_output, decays = gather(call.grad_output), decays_of(gather(call.g), per_key)
    scale = k_dim**-0.5 if call.scale is None else call.scale
    unit_q, unit_k = raw_q, raw_k
    if call.qk_l2norm:
        unit_q, unit_k = normalised(raw_q), normalised(raw_k)
    since, left, whole = decays.since, decays.left, decays.since[:, :, -1:]
    key_products, query_products = decays.products(unit_q * scale, unit_k)
    queries, keys = (x.repeat_interleave(per_key, 1) for x in (unit_q * scale, unit_k))
    solved = inverse(strength * key_products)
    opened_q, opened_k, closing = since * queries, since * keys, left * keys

    # The state with which each piece begins, and what its tokens find missing and write.
    begun = values.new_zeros(values.shape[0], v_heads, v_dim, k_dim)
    missing, written = torch.zeros_like(values), torch.zeros_like(values)
    state, first = torch.zeros_like(grad_state), layout.end - layout.of_row
    if call.initial_states is not None:
        state = call.initial_states.to(compute)
    for number in range(fixed(layout.longest)):
        exists = number < layout.of_row
        piece = torch.where(exists, first + number, 0)
        lacking = values[piece] - opened_k[piece] @ state.mT
        new = solved[piece] @ (strength[piece] * lacking)
        for tensor, found in ((begun, state), (missing, lacking), (written, new)):
            store_rows(tensor, piece, found, exists)
        after = whole[piece] * state + new.mT @ closing[piece]
        state = torch.where(exists.view(n, 1, 1, 1), after, state)

    # The gradient of the state with which each piece ends, and of what its tokens find missing, by their strength.
    grad_ended, grad_solved = torch.zeros_like(begun), torch.zeros_like(values)
    for number in reversed(range(fixed(layout.longest))):
        exists = number < layout.of_row
        piece = torch.where(exists, first + number, 0)
        grad_new = query_products[piece].mT @ grad_output[piece] + closing[piece] @ grad_state.mT
        found = solved[piece].mT @ grad_new
        store_rows(grad_ended, piece, grad_state, exists)
        store_rows(grad_solved, piece, found, exists)
        before = whole[piece] * grad_state + grad_output[piece].mT @ opened_q[piece]
        before = before - (strength[piece] * found).mT @ opened_k[piece]
        grad_state = torch.where(exists.view(n, 1, 1, 1), before, grad_state)

    grad_values = strength * grad_solved
    grad_query_products = (grad_output @ written.mT).tril()
    grad_system = -(grad_solved @ written.mT).tril(-1)
    grad_queries, grad_keys, grad_decay = decays.gradients(
        unit_q * scale, unit_k, grad_system * strength, grad_query_products
    )
    read_q, read_k, closed = (
        since * (grad_output @ begun),
        -since * (grad_values @ begun),
        left * (written @ grad_ended),
    )
    grad_queries = grad_queries + read_q
    grad_keys = grad_keys + read_k + closed
    grad_strength = (grad_solved * missing).sum(3) + (grad_system * key_products).sum(3)

    grad_decay = grad_decay + of_decays(read_q * queries + read_k * keys).flip(2).cumsum(2).flip(2)
    grad_decay[:, :, 1:] += of_decays(closed * keys).cumsum(2)[:, :, :-1]
    grad_decay += of_decays((whole * grad_ended * begun).sum(2, keepdim=True))

    grad_q, grad_k = of_keys(grad_queries) * scale, of_keys(grad_keys)
    if call.qk_l2norm:
        grad_q, grad_k = _through_norm(raw_q, unit_q, grad_q), _through_norm(raw_k, unit_k, grad_k)
    for gradients, gradient in (
        (grad_q, call.grad_q),
        (grad_k, call.grad_k),
        (grad_values, call.grad_v),
        (grad_decay, call.grad_g),
        (grad_strength, call.grad_beta),
    ):
        scatter(gradients, gradient)
    if call.initial_states is not None:
        call.grad_initial_states.copy_(grad_state)
