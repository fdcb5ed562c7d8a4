"""The gated delta rule on FlashInfer's kernels, which are written in nvidia-cutlass-dsl."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mamba_ops.backends.flashinfer import cleaned, first_column, is_padding, not_installed, older_than
from mamba_ops.ops._common.checking import short

if TYPE_CHECKING:
    from mamba_ops.ops.gated_delta_rule_update.op import Arguments


def unsupported_by_both(q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> str | None:
    """Return what the kernels of both gated delta rule ops refuse."""
    if reason := older_than(9, q.device) or not_installed("cutlass", "nvidia-cutlass-dsl", "the gated delta rule"):
        return reason
    return unsupported_tokens(q, k, v, output)


def unsupported_tokens(q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> str | None:
    """Return what kernels refuse that take bfloat16 and heads of 128 alone."""
    if q.dtype != torch.bfloat16:
        return f"takes a bfloat16 q, and it is {short(q.dtype)}"
    for name, tensor in (("k", k), ("v", v), ("out", output)):
        if tensor.dtype != q.dtype:
            return f"takes {name} in q's bfloat16, and it is {short(tensor.dtype)}"
    for name, tensor in (("k_dim", k), ("v_dim", v)):
        if tensor.shape[-1] != 128:
            return f"takes a {name} of 128, and it is {tensor.shape[-1]}"
    return None


def unsupported(call: "Arguments") -> str | None:
    if reason := unsupported_by_both(call.q, call.k, call.v, call.output):
        return reason
    if call.g is not None:
        return "computes the gates itself, from a, b, A_log and dt_bias, and g and beta are given"
    for name, gate in (("a", call.a), ("b", call.b)):
        if gate is not None and gate.dtype != call.q.dtype:
            return f"takes {name} in q's bfloat16, and it is {short(gate.dtype)}"
    if call.ssm_state.dtype not in (torch.float32, torch.bfloat16):
        return f"takes a float32 or bfloat16 state, and it is {short(call.ssm_state.dtype)}"
    if call.cu_seqlens is not None:
        return "takes no packed rows"
    if call.num_accepted_tokens is not None:
        return "does no speculative decoding"
    if call.write_slots is not None and call.slots is None:
        return "takes write_slots together with slots"
    if _needs_spare_slot(call.ssm_state, call.slots, call.write_slots) and call.null_slot != 0:
        return (
            "runs padding rows in slot 0 where the state is bfloat16 or there are write slots, and null_slot "
            f"is {call.null_slot}; keep slot 0 free and say null_slot=0"
        )
    return None


def _needs_spare_slot(ssm_state: Tensor, slots: Tensor | None, write_slots: Tensor | None) -> bool:
    """Whether negative slots have to be given to FlashInfer as slot 0, which it then reads and writes."""
    return write_slots is not None or (slots is not None and ssm_state.dtype == torch.bfloat16)


def unsupported_layout(ssm_state: Tensor, output: Tensor) -> str | None:
    if not ssm_state[:1].is_contiguous():
        return f"takes a state whose slots are each dense, and its strides are {ssm_state.stride()}"
    if (ssm_state.data_ptr() | ssm_state.stride(0) * ssm_state.itemsize) & 31:
        return "takes a state whose slots start at multiples of 32 bytes, and not all of them do"
    if not output.is_contiguous() or output.data_ptr() & 31:
        return "takes an out that is contiguous and starts at a multiple of 32 bytes"
    return None


def gated_delta_rule_update(call: "Arguments") -> None:
    """Takes bfloat16 with a k_dim and a v_dim of 128, a float32 or bfloat16 state, and gates that it computes; one
    token a row or a few, neither packed nor speculative. Needs nvidia-cutlass-dsl.

    Where the state is bfloat16 and has slots, or there are write slots, padding rows run in slot 0, which is then
    scratch: null_slot must be 0.
    """
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose as kernel

    rows = call.v.shape[0]
    if call.output.numel() == 0:
        return
    source = target = None
    if call.slots is not None:
        source = cleaned(first_column(call.slots, rows), call.null_slot)
    if source is not None and call.write_slots is not None:
        target = cleaned(first_column(call.write_slots, rows), call.null_slot)
        target = torch.where(is_padding(source), 0, target).clamp_min(0)
    indices = torch.arange(rows, dtype=torch.int32, device=call.v.device) if source is None else source
    if _needs_spare_slot(call.ssm_state, call.slots, call.write_slots):
        indices = indices.clamp_min(0)

    def tokens(tensor: Tensor | None) -> Tensor | None:
        """Return an activation as (rows, length, ...), contiguous."""
        return None if tensor is None else (tensor if call.v.dim() == 4 else tensor.unsqueeze(1)).contiguous()

    kernel(
        tokens(call.q),
        tokens(call.k),
        tokens(call.v),
        None,
        None if call.A_log is None else call.A_log.float().contiguous(),
        tokens(call.a),
        None if call.dt_bias is None else call.dt_bias.float().contiguous(),
        tokens(call.b),
        scale=call.scale,
        output=call.output if call.v.dim() == 4 else call.output.unsqueeze(1),
        use_qk_l2norm=call.qk_l2norm,
        initial_state=call.ssm_state,
        initial_state_indices=indices,
        output_state_indices=target,
        backend="flashinfer",
    )
    if source is not None:
        call.output.masked_fill_(is_padding(source, call.output.dim()), 0)
