"""The gated delta rules token by token in plain torch, whatever decays what."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import fixed
from mamba_ops.ops._common.delta_rule_reference import normalised
from mamba_ops.ops._common.narrow import read_states, store_states
from mamba_ops.ops._common.slots import padded_rows, store_rows, update_ends


def softplus(d: Tensor) -> Tensor:
    """Return log(1 + exp(d)); it is linear above 20. Not torch's own, whose last bits on a CPU depend on the place."""
    # Clamped, its gradient is finite too; above 20, as that of a clamp is zero at the limit itself from torch 2.14 on.
    return torch.where(d > 20, d, torch.log1p(torch.exp(d.clamp(max=30))))


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)). Not torch's own, whose last bits on a CPU depend on where an element stands."""
    return 1 / (1 + torch.exp(-x.clamp(min=-88)))  # so that no exponential overflows, and gradients are finite too


def advance(call: Any, gates: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Advance `ssm_state` and write the outputs of a call.

    Args:
        call: of an op that advances states by a few tokens.
        gates: given a and b, (n, length, v_heads, ...), A_log and dt_bias, returns the logs of the decays, like a, and
            how much of each value is written, like b.
    """
    compute = torch.promote_types(call.q.dtype, torch.float32)
    flat = call.v.dim() < call.ssm_state.dim()
    in_order = call.slots is None and call.write_slots is None and call.cu_seqlens is None
    # Row i has slot i, every row has all its tokens, and none is rolled back.
    is_plain = in_order and call.num_accepted_tokens is None
    index = ends = None
    n, length = call.v.shape[0], 1 if flat else call.v.shape[1]
    if call.cu_seqlens is not None:
        index, inside = padded_rows(call.cu_seqlens, call.v.shape[0])
        n, length = inside.shape
    elif not is_plain:
        inside = call.v.new_ones(n, length, dtype=torch.bool)
    if n == 0 or length == 0:
        return

    def rows(tokens: Tensor) -> Tensor:
        """An activation as (n, length, heads, ...)."""
        if index is not None:
            tokens = tokens[index]
        elif flat:
            tokens = tokens.unsqueeze(1)
        return tokens.to(compute)

    if not is_plain:
        cache = None if in_order else call.ssm_state
        tables = (call.slots, call.write_slots, call.null_slot, call.num_accepted_tokens)
        ends = update_ends(*tables, inside, cache)

    queries, keys, values = rows(call.q), rows(call.k), rows(call.v)
    if call.qk_l2norm:
        queries, keys = normalised(queries), normalised(keys)
    queries = queries * (call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.g is not None and call.beta is not None:
        decay, strength = rows(call.g), rows(call.beta)
    else:
        decay, strength = gates(rows(call.a), rows(call.b), call.A_log, call.dt_bias)
    decay = torch.exp(decay)

    k_heads, per_key = call.q.shape[-2], call.v.shape[-2] // call.q.shape[-2]
    # Rows in order are a view: a state of the dtype that is computed in then advances where it is.
    slots = slice(n) if ends is None or in_order else torch.where(ends.is_active, ends.source, 0)
    s = read_states(call, slots, compute)
    s = s.unflatten(1, (k_heads, per_key))
    y = values.new_empty(values.shape)  # not empty_like, which ONNX has not
    for t in range(fixed(length)):
        # Not by matrix products: on a CPU those of one column take three times as long as a product and a sum.
        key, query = (x[:, t, :, None, None, :] for x in (keys, queries))
        by = decay[:, t].view(n, k_heads, per_key, 1, -1)
        new = s * by if index is not None else s.mul_(by)
        wrong = values[:, t].view(n, k_heads, per_key, -1) - (new * key).sum(-1)
        wrong = strength[:, t].view(n, k_heads, per_key, 1) * wrong
        new += wrong.unsqueeze(-1) * key
        read = (new * query).sum(-1).view_as(y[:, t])
        if ends is None:
            y[:, t] = read
            continue
        here = inside[:, t] & ends.is_active
        y[:, t] = torch.where(here.view(n, 1, 1), read, 0)
        s = new if index is None else torch.where(here.view(n, 1, 1, 1, 1), new, s)
        if call.num_accepted_tokens is not None and t < ends.target.shape[1]:
            store_states(call, ends.target[:, t], s.flatten(1, 2), ends.stored[:, t])
    if in_order and call.ssm_state.dtype != compute:
        rows_of_states = torch.arange(n, device=call.v.device) if ends is None else ends.source
        store_states(call, rows_of_states, s.flatten(1, 2), None)
    elif ends is not None and not in_order and call.num_accepted_tokens is None:
        store_states(call, ends.target[:, 0], s.flatten(1, 2), ends.stored[:, 0])

    if index is not None:
        store_rows(call.output, index.flatten(), y.flatten(0, 1), inside.flatten())
    else:
        call.output.copy_(y[:, 0] if flat else y)
