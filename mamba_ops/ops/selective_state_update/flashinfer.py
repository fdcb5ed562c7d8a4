"""Decode for Mamba-2 on `flashinfer.mamba.selective_state_update`.

A kernel is compiled with nvcc at the first call of its dtypes and sizes, unless it was installed prebuilt. To keep
their number low, indices are passed as int32 and A as float32.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mamba_ops.backends.flashinfer import (
    cleaned,
    first_column,
    flashinfer,
    is_padding,
    older_than,
    why_not_setting,
)
from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.slots import row_of_tokens

if TYPE_CHECKING:
    from mamba_ops.ops.selective_state_update.op import Arguments

_MOST_SLOTS = 2**24
_LONGEST = 16  # tokens of a row: a kernel is compiled for each number, and its shared memory grows with it


def unsupported(call: "Arguments") -> str | None:
    if reason := older_than(8, call.x.device):
        return reason
    if call.A.dim() > 1:
        return "takes one A for a whole head, as Mamba-2 has it, and A has one for every channel and entry of the state"
    for name, weight, rank in (("dt", call.dt, call.x.dim() - 1), ("D", call.D, 1), ("dt_bias", call.dt_bias, 1)):
        if weight is not None and weight.dim() != rank:
            return f"takes one {name} for a whole head, and {name} has one for every channel"
    for name, tensor in (("x", call.x), ("ssm_state", call.ssm_state)):
        if tensor.dtype == torch.float64:
            return f"computes in float32, and {name} is float64"
    if call.ssm_state.dtype == torch.float8_e4m3fn:
        return "takes no float8_e4m3fn state, but one of int16"
    if call.state_scale is not None and call.rounding_seed is not None:
        return "rounds an int16 state to the nearest, and a rounding_seed is given"
    for name, given in (("B", call.B), ("C", call.C), ("z", call.z), ("out", call.output)):
        if given is not None and given.dtype != call.x.dtype:
            return f"takes {name} in x's {short(call.x.dtype)}, and it is {short(given.dtype)}"
    slot_count, heads, dim, dstate = call.ssm_state.shape
    if dim not in (64, 128):
        return f"takes a dim of 64 or 128, and it is {dim}"
    if dstate not in (64, 96, 128, 256):
        return f"takes a dstate of 64, 96, 128 or 256, and it is {dstate}"
    rows = row_count(call.x, call.cu_seqlens)
    if rows > slot_count:
        return f"takes no more rows than state has slots, and there are {rows} rows and {slot_count} slots"
    if slot_count >= _MOST_SLOTS:
        return f"takes a state of fewer than {_MOST_SLOTS} slots, and it has {slot_count}"
    if call.cu_seqlens is not None and call.num_accepted_tokens is None:
        return "takes packed rows in speculative decoding alone, where a table's columns limit a row's length"

    algorithm = flashinfer.settings["algorithm"]
    several = call.x.dim() == 4 or call.write_slots is not None or call.num_accepted_tokens is not None
    if several:
        table = call.slots if call.write_slots is None else call.write_slots
        columns = 1 if table is None or table.dim() == 1 else table.shape[1]
        length = columns if call.cu_seqlens is not None else call.x.shape[1] if call.x.dim() == 4 else 1
        if length > _LONGEST:
            return f"takes at most {_LONGEST} tokens a row, and there may be {length}"
        if algorithm == "horizontal" and call.state_scale is not None:
            return "takes no int16 state with the algorithm horizontal for several tokens a row, or write slots"
        if algorithm in ("vertical", "horizontal"):
            what = f"the algorithm {algorithm} for several tokens a row, or write slots, on "
            if reason := older_than(10, call.x.device, what):
                return reason
            if call.cu_seqlens is not None:
                return f"takes no packed rows with the algorithm {algorithm}"
    if several or algorithm == "horizontal":
        of_group = heads // call.B.shape[-2]
        if of_group not in (1, 2, 4, 8, 16, 32, 64):
            return f"takes 1, 2, 4, 8, 16, 32 or 64 heads a group for this call, and there are {of_group}"
    return why_not_setting("algorithm", algorithm, call.x.device)


def unsupported_layout(
    ssm_state: Tensor, x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, state_scale: Tensor | None, output: Tensor
) -> str | None:
    """Call `_unsupported_addresses` only if it returns a refusal: this runs in every call, and has to be short."""
    _, _, dim, dstate = ssm_state.shape
    slot, *inner = ssm_state.stride()
    bad = inner != [dim * dstate, dstate, 1] or not output.is_contiguous()
    bad |= state_scale is not None and not state_scale.is_contiguous()
    places = ssm_state.data_ptr() | slot * ssm_state.itemsize | output.data_ptr()
    for tensor, width in ((x, dim), (B, dstate), (C, dstate), (z, dim)):
        if tensor is not None:
            *tokens, row, entry = tensor.stride()
            bad |= entry != 1 or row != width
            for token in tokens:
                places |= token * tensor.itemsize
            places |= tensor.data_ptr()
    return _unsupported_addresses(ssm_state, x, B, C, z, state_scale, output) if bad or places & 15 else None


def _unsupported_addresses(
    ssm_state: Tensor, x: Tensor, B: Tensor, C: Tensor, z: Tensor | None, state_scale: Tensor | None, output: Tensor
) -> str | None:
    """Return the refusal of strides or addresses."""
    _, _, dim, dstate = ssm_state.shape
    slot, *inner = ssm_state.stride()
    if inner != [dim * dstate, dstate, 1]:
        return f"takes a state whose slots are each dense, and its strides are {ssm_state.stride()}"
    if (ssm_state.data_ptr() | slot * ssm_state.itemsize) & 15:
        return "takes a state whose slots start at multiples of 16 bytes, and not all of them do"
    if state_scale is not None and not state_scale.is_contiguous():
        return f"takes a state_scale that is contiguous, and its strides are {state_scale.stride()}"
    if not output.is_contiguous():
        return f"takes an out that is contiguous, and its strides are {output.stride()}"
    for name, tensor, width in (("x", x, dim), ("B", B, dstate), ("C", C, dstate), ("z", z, dim), ("out", output, dim)):
        if tensor is None:
            continue
        *tokens, row, entry = tensor.stride()
        if (row, entry) != (width, 1):
            return f"takes tokens of {name} that are each dense, and its strides are {tensor.stride()}"
        if any(place & 15 for place in (tensor.data_ptr(), *(token * tensor.itemsize for token in tokens))):
            return f"takes tokens of {name} that start at multiples of 16 bytes, and not all of them do"
    return None


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers of heads in a dtype, contiguous."""
    weight = weight if weight.dtype == dtype else weight.to(dtype)
    return weight if weight.stride(-1) == 1 else weight.clone(memory_format=torch.contiguous_format)


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    from flashinfer.mamba import selective_state_update as kernel

    return cast(Callable[..., Tensor], kernel)


def selective_state_update(call: "Arguments") -> None:
    """Takes Mamba-2 alone (one A, dt, D and dt_bias a head), a dim of 64 or 128, a dstate of 64, 96, 128 or 256, B, C,
    z and out in x's dtype, dense slots and tokens that start at multiples of 16 bytes, at most 16 tokens a row, and
    packed rows in speculative decoding alone. An int16 state is rounded to the nearest, and its state_scale contiguous.
    In speculative decoding a row of more tokens than its write slots have columns fails an
    assertion on the device.

    Its exponential and logarithm are the GPU's fast ones. With the algorithm auto the number of rows decides on the
    algorithm, and so on the last bits. Its stochastic rounding turns subnormal numbers of float16 into zeros and does
    not keep infinities and NaN, except on GPUs with an instruction for it.
    """
    x = call.x
    dt = call.dt
    B = call.B
    C = call.C
    D = call.D
    z = call.z
    cu_seqlens = call.cu_seqlens
    rows = row_count(x, cu_seqlens)
    if rows == 0 or call.output.numel() == 0:
        return
    _, heads, dim, dstate = call.ssm_state.shape
    dtype = dt.dtype
    for weight in (D, call.dt_bias):
        if weight is not None and weight.dtype != dtype:
            dtype = torch.promote_types(dtype, weight.dtype)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    dt = _dense(dt, dtype)
    D = dt.new_zeros(heads) if D is None else _dense(D, dtype)

    source, target, longest = None, None, 0
    if call.slots is not None:
        if call.num_accepted_tokens is None:
            source = cleaned(first_column(call.slots, rows), call.null_slot)
        else:
            columns = call.slots[:rows] if call.slots.dim() == 2 else call.slots[:rows].unsqueeze(1)
            target = cleaned(columns, call.null_slot)
            last = (call.num_accepted_tokens.long() - 1).clamp(0, columns.shape[1] - 1)
            source = target.gather(1, last.unsqueeze(1)).squeeze(1)
    if call.write_slots is not None:
        if call.num_accepted_tokens is None:  # only the state after the last token is stored
            before = x.shape[1] - 1 if x.dim() == 4 else 0
            last = cleaned(first_column(call.write_slots, rows), call.null_slot).unsqueeze(1)
            target = torch.nn.functional.pad(last, (before, 0), value=-1) if before else last
        else:
            columns = call.write_slots[:rows] if call.write_slots.dim() == 2 else call.write_slots[:rows].unsqueeze(1)
            target = cleaned(columns, call.null_slot)
    written = call.output
    dt = dt.as_strided(x.shape, (*dt.stride(), 0))
    if cu_seqlens is not None and target is not None:
        longest = target.shape[1]
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
        torch._assert_async(
            (cu_seqlens.diff() <= longest).all(),
            "mamba_ops::selective_state_update on flashinfer: a row has more tokens than its write slots have columns",
        )
    elif target is not None and x.dim() == 3:
        x, dt, B, C, written = (tensor.unsqueeze(1) for tensor in (x, dt, B, C, call.output))
        z = None if z is None else z.unsqueeze(1)

    _kernel()(
        call.ssm_state,
        x,
        dt,
        _dense(call.A, torch.float32).as_strided((heads, dim, dstate), (1, 0, 0)),
        B,
        C,
        D.as_strided((heads, dim), (1, 0)),
        z=z,
        dt_bias=None if call.dt_bias is None else _dense(call.dt_bias, dtype).as_strided((heads, dim), (1, 0)),
        dt_softplus=call.dt_softplus,
        state_batch_indices=source,
        pad_slot_id=-1,
        state_scale=call.state_scale,
        out=written,
        rand_seed=call.rounding_seed,
        philox_rounds=call.philox_rounds or 10,
        cache_steps=longest,
        algorithm=flashinfer.settings["algorithm"],
        dst_state_batch_indices=target,
        cu_seqlens=cu_seqlens,
    )
    if source is not None:  # FlashInfer computes padding rows from a zero state
        if cu_seqlens is None:
            padding = is_padding(source, call.output.dim())
        else:
            row, inside = row_of_tokens(cu_seqlens, call.output.shape[0])
            padding = (is_padding(source)[row] & inside).view(-1, 1, 1)
        call.output.masked_fill_(padding, 0)
