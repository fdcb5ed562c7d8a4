"""The plain-torch kernel of mamba3_chunk_scan: its reference, composed of mamba_chunk_scan."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.mamba3 import Ranks, State, Tokens, by_head, layout, operands_dtype, scan
from mamba_ops.ops._common.mamba3_checks import CACHES
from mamba_ops.ops._common.slots import Ends, initial_states, row_ends, store_rows
from mamba_ops.ops.mamba3_chunk_scan.op import Arguments
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan as chunk_scan


def mamba3_chunk_scan(call: Arguments) -> None:
    read(call)


def read(call: Arguments, *, check_only: bool = False) -> None:
    """Make a call; with `check_only` only ask if mamba_chunk_scan takes it."""
    compute = torch.promote_types(call.x.dtype, torch.float32)
    if row_count(call.x, call.cu_seqlens) == 0:
        return
    rows, heads = layout(call.x, call.cu_seqlens), call.x.shape[-2]
    is_empty = rows.starts == rows.ends
    ends = row_ends(call.slots, call.write_slots, call.null_slot, is_empty, call.ssm_state)
    begun = {name: _begun(call, name, ends) for name in CACHES}

    def keep(name: str, value: Tensor | None) -> None:
        cache, initial = getattr(call, name), begun[name]
        if cache is not None and initial is not None:
            empty = is_empty.view(-1, *[1] * (initial.dim() - 1))
            value = initial if value is None else torch.where(empty, initial, value.to(initial.dtype))
            store_rows(cache, ends.target, value, ends.stored)

    if not rows.row.shape[0]:
        for name in CACHES if call.write_slots is not None and not check_only else ():
            keep(name, None)
        return

    def packed(tensor: Tensor) -> Tensor:
        return (tensor if call.cu_seqlens is not None else tensor.flatten(0, 1)).to(compute)

    k, q = (by_head(packed(t), bias, heads, compute) for t, bias in ((call.B, call.B_bias), (call.C, call.C_bias)))
    x, dt, A, trap, angles = map(packed, (call.x, call.dt, call.A, call.trap, call.angles))
    ranks = Ranks.of(call.mimo_x, call.mimo_z, call.mimo_o, compute)
    tokens = Tokens(x, dt, A, trap, angles, k, q, ranks)
    state = None
    if call.has_initial_state is not None:
        kept = (begun[name] for name in ("angle_state", "k_state", "v_state"))
        angle, k_before, x_before = (initial.to(compute) for initial in kept if initial is not None)
        state = State(angle, k_before if k_before.dim() == 4 else k_before.unsqueeze(1), x_before)

    def run(*arguments: Any, cu_seqlens: Tensor) -> Tensor:
        out: Tensor = arguments[0].new_zeros(arguments[0].shape)
        inner: Any = chunk_scan.check_supported if check_only else chunk_scan.call_undispatched
        inner(
            *arguments,
            cu_seqlens=cu_seqlens,
            ssm_state=call.ssm_state,
            slots=call.slots,
            write_slots=call.write_slots,
            has_initial_state=call.has_initial_state,
            null_slot=call.null_slot,
            out=out,
        )
        return out

    dtype, keeps = operands_dtype(call.x, call.B, call.C), call.ssm_state is not None
    found = scan(tokens, rows, run, call.chunk_size, dtype, state=state, keeps=keeps)
    if check_only:
        return
    y = ranks.finish(found.y, x, call.D, None if call.z is None else packed(call.z))
    of_token = (-1, *[1] * (y.dim() - 1))
    y = torch.where(ends.is_active[rows.row].view(of_token), y, 0).to(call.output.dtype)
    output = call.output if call.cu_seqlens is not None else call.output.flatten(0, 1)
    output = torch.where(rows.owned.view(of_token), y, output)
    call.output.copy_(output.view(call.output.shape))
    last = (rows.ends - 1).clamp(min=0)
    last_k = found.k[last] if call.mimo_x is not None else found.k[last].squeeze(1)
    for name, value in {"angle_state": found.angle[last], "k_state": last_k, "v_state": x[last]}.items():
        keep(name, value)


def _begun(call: Arguments, name: str, ends: Ends) -> Tensor | None:
    """Return what rows begin with of a cache, in float32 at least; None without it."""
    cache: Tensor | None = getattr(call, name)
    if cache is None:
        return None
    goes_on = torch.zeros_like(ends.is_active) if call.has_initial_state is None else call.has_initial_state
    return initial_states(cache, ends, goes_on, torch.promote_types(cache.dtype, torch.float32))
