"""Decode with Kimi Delta Attention on `flashinfer.recurrent_kda`, whose kernels are written in nvidia-cutlass-dsl."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.backends.flashinfer import cleaned, dense, first_column, not_installed, older_than
from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.slots import slot_columns

if TYPE_CHECKING:
    from mamba_ops.ops.kda_update.op import Arguments

_LONGEST = 16  # tokens of a row: a kernel is compiled for each number, and its shared memory grows with it


def unsupported(call: "Arguments") -> str | None:
    if reason := older_than(10, call.q.device) or not_installed("cutlass", "nvidia-cutlass-dsl", "KDA"):
        return reason
    if call.q.dtype != torch.bfloat16:
        return f"takes a bfloat16 q, and it is {short(call.q.dtype)}"
    given = {name: getattr(call, name) for name in ("k", "v", "g", "beta", "a", "b")}
    for name, tensor in (*given.items(), ("out", call.output)):
        if tensor is not None and tensor.dtype != call.q.dtype:
            return f"takes {name} in q's bfloat16, and it is {short(tensor.dtype)}"
    if call.ssm_state.dtype != torch.bfloat16:
        return f"takes a bfloat16 state, and it is {short(call.ssm_state.dtype)}"
    _, v_heads, v_dim, k_dim = call.ssm_state.shape
    if k_dim not in (64, 128) or v_dim != k_dim:
        return f"takes a k_dim and a v_dim of both 64 or both 128, and they are {k_dim} and {v_dim}"
    k_heads = call.q.shape[-2]
    if call.a is not None and k_heads != v_heads:
        return f"computes the gates of heads of k, and there are {k_heads} of these and {v_heads} of v; give g and beta"
    return _unsupported_rows(call)


def _unsupported_rows(call: "Arguments") -> str | None:
    """Return the refusal of how rows, their tokens and their slots are given."""
    if call.cu_seqlens is not None:
        return "takes no packed rows"
    if call.write_slots is not None and call.slots is None:
        return "takes write_slots together with slots"
    length = call.v.shape[1] if call.v.dim() == 4 else 1
    if call.num_accepted_tokens is None:
        if length > 1:
            return (
                "keeps the state after every token, and so takes a few tokens a row with num_accepted_tokens alone; "
                f"there are {length}"
            )
    elif length > _LONGEST:
        return f"takes at most {_LONGEST} tokens a row, and there are {length}"
    else:
        name, table = ("slots", call.slots) if call.write_slots is None else ("write_slots", call.write_slots)
        columns = 1 if table is None or table.dim() == 1 else table.shape[1]
        if columns < length:
            return f"takes as many columns of {name} as a row has tokens, and they are {columns} and {length}"
    if _needs_spare_slot(call) and call.null_slot != 0:
        return (
            "leaves out a token whose state has no place, so that such states go to slot 0 where there are write slots "
            f"or num_accepted_tokens, and null_slot is {call.null_slot}; keep slot 0 free and say null_slot=0"
        )
    return None


def _needs_spare_slot(call: "Arguments") -> bool:
    """Whether a state that is not to be stored, of a row that is somebody, has to go to slot 0."""
    return call.write_slots is not None or call.num_accepted_tokens is not None


def unsupported_layout(ssm_state: Tensor, output: Tensor) -> str | None:
    if not ssm_state[:1].is_contiguous():
        return f"takes a state whose slots are each dense, and its strides are {ssm_state.stride()}"
    if (ssm_state.data_ptr() | ssm_state.stride(0) * ssm_state.itemsize) & 15:
        return "takes a state whose slots start at multiples of 16 bytes, and not all of them do"
    if not output.is_contiguous() or output.data_ptr() & 15:
        return "takes an out that is contiguous and starts at a multiple of 16 bytes"
    return None


def kda_update(call: "Arguments") -> None:
    """Takes bfloat16 tokens, gates and states, a k_dim and a v_dim of both 64 or both 128, and as many heads of k as of
    v where it computes the gates; one token a row, or up to 16 with num_accepted_tokens, not packed. Needs
    nvidia-cutlass-dsl.

    Where there are write slots or num_accepted_tokens, states that are not to be stored go to slot 0, which is then
    scratch: null_slot must be 0. The number of rows times heads decides on the kernel, and so on the last bits.
    """
    from flashinfer.kda import recurrent_kda as kernel

    rows = call.v.shape[0]
    if call.output.numel() == 0:
        return
    length = call.v.shape[1] if call.v.dim() == 4 else 1
    source, target = _ends(call, rows, length)

    def packed(tensor: Tensor | None) -> Tensor | None:
        """Return tokens as (1, tokens, ...)."""
        if tensor is None:
            return None
        return dense((tensor if call.v.dim() == 3 else tensor.flatten(0, 1)).unsqueeze(0))

    raw = call.a is not None
    kernel(
        packed(call.q),
        packed(call.k),
        packed(call.v),
        packed(call.a if raw else call.g),
        packed(call.b if raw else call.beta),
        A_log=None if call.A_log is None else dense(call.A_log.float()),
        dt_bias=None if call.dt_bias is None else dense(call.dt_bias.float()).flatten(),
        scale=call.scale,
        initial_state=call.ssm_state,
        use_qk_l2norm_in_kernel=call.qk_l2norm,
        use_gate_in_kernel=raw,
        lower_bound=call.lower_bound,
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=call.v.device),
        ssm_state_indices=source if target is None else target,
        num_spec_tokens=length - 1 if length > 1 else None,
        output=(call.output if call.v.dim() == 3 else call.output.flatten(0, 1)).unsqueeze(0),
        initial_state_source=None if target is None else call.ssm_state,
        initial_state_indices=None if target is None else source,
        beta_is_logit=raw,
        backend="cute-dsl",
    )


def _ends(call: "Arguments", rows: int, length: int) -> tuple[Tensor, Tensor | None]:
    """Return the slots that rows read, (n,), and those that their tokens' states go to; None: the same.

    Both are int32 and contiguous; -1 stands for padding. FlashInfer leaves out a token whose state has no place, so
    where a row is no padding that place is slot 0. It reads slot 0 for padding rows, too, and does nothing with it.
    """
    if call.slots is None:
        return torch.arange(rows, dtype=torch.int32, device=call.v.device), None
    if not _needs_spare_slot(call):
        return cleaned(first_column(call.slots, rows), call.null_slot), None
    columns = slot_columns(call.slots, rows)
    if call.num_accepted_tokens is None:
        source = columns[:, 0]
    else:
        last = (call.num_accepted_tokens.long() - 1).clamp(0, columns.shape[1] - 1)
        source = columns.gather(1, last.unsqueeze(1)).squeeze(1)
    source = cleaned(source, call.null_slot).contiguous()
    written = columns if call.write_slots is None else slot_columns(call.write_slots, rows)
    target = cleaned(written[:, :length], call.null_slot).clamp_min(0)
    target = torch.where(source.unsqueeze(1) < 0, -1, target).contiguous()
    return source, target.flatten() if length == 1 else target
