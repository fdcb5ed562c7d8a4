"""The plain-torch kernel of mamba3_chunk_scan: its reference, composed of mamba_chunk_scan."""

from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.mamba3 import State, Tokens, by_head, finished, layout, operands_dtype, scan
from mamba_ops.ops._common.slots import initial_states, row_ends, store_rows
from mamba_ops.ops.mamba3_chunk_scan.op import Arguments
from mamba_ops.ops.mamba_chunk_scan import mamba_chunk_scan as chunk_scan


def mamba3_chunk_scan(call: Arguments) -> None:
    compute = torch.promote_types(call.x.dtype, torch.float32)
    rows, heads = layout(call.x, call.cu_seqlens), call.x.shape[-2]
    if not rows.starts.shape[0] or not rows.row.shape[0]:
        return

    def packed(tensor: Tensor) -> Tensor:
        return (tensor if call.cu_seqlens is not None else tensor.flatten(0, 1)).to(compute)

    k, q = (by_head(packed(t), bias, heads, compute) for t, bias in ((call.B, call.B_bias), (call.C, call.C_bias)))
    x, dt, A, trap, angles = map(packed, (call.x, call.dt, call.A, call.trap, call.angles))
    tokens = Tokens(x, dt, A, trap, angles, k, q)
    is_empty = rows.starts == rows.ends
    ends, state = row_ends(call.slots, None, call.null_slot, is_empty, call.ssm_state), None
    if call.has_initial_state is not None:
        caches = (call.angle_state, call.k_state, call.v_state)
        goes_on = call.has_initial_state
        state = State(*(initial_states(cache, ends, goes_on, compute) for cache in caches if cache is not None))

    def run(*arguments: Any, cu_seqlens: Tensor) -> Tensor:
        out: Tensor = arguments[0].new_zeros(arguments[0].shape)
        chunk_scan.call_undispatched(
            *arguments,
            cu_seqlens=cu_seqlens,
            ssm_state=call.ssm_state,
            slots=call.slots,
            has_initial_state=call.has_initial_state,
            null_slot=call.null_slot,
            out=out,
        )
        return out

    dtype, keeps = operands_dtype(call.x, call.B, call.C), call.ssm_state is not None
    found = scan(tokens, rows, run, call.chunk_size, dtype, state=state, keeps=keeps)
    y = finished(found.y, x, call.D, None if call.z is None else packed(call.z))
    y = torch.where(ends.is_active[rows.row].view(-1, 1, 1), y, 0).to(call.output.dtype)
    output = call.output if call.cu_seqlens is not None else call.output.flatten(0, 1)
    output = torch.where(rows.owned.view(-1, 1, 1), y, output)
    call.output.copy_(output.view(call.output.shape))
    last = (rows.ends - 1).clamp(min=0)
    values = {"angle_state": found.angle[last], "k_state": found.k[last], "v_state": x[last]}
    for name, value in values.items():
        if (cache := getattr(call, name)) is not None:
            store_rows(cache, ends.target, value, ends.stored)
