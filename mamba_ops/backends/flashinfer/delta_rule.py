"""The gated delta rule on FlashInfer's kernels, which are written in nvidia-cutlass-dsl."""

import importlib.util

import torch
from torch import Tensor

from mamba_ops.backends.flashinfer.vendor import INSTALL, cleaned, first_column, flashinfer, nobody, older_than
from mamba_ops.ops import chunk_gated_delta_rule, gated_delta_rule_update
from mamba_ops.ops.checking import short
from mamba_ops.ops.pieces import row_count
from mamba_ops.ops.slots import initial_states, row_ends, row_of_tokens, store_rows


def _why_no_delta_rule(q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> str | None:
    """What both of its kernels refuse."""
    if reason := older_than(9, q.device):
        return reason
    if importlib.util.find_spec("cutlass") is None:
        return f"needs nvidia-cutlass-dsl for the gated delta rule, which is not installed; pip install '{INSTALL}'"
    if q.dtype != torch.bfloat16:
        return f"takes a bfloat16 q, and it is {short(q.dtype)}"
    for name, tensor in (("k", k), ("v", v), ("out", output)):
        if tensor.dtype != q.dtype:
            return f"takes {name} in q's bfloat16, and it is {short(tensor.dtype)}"
    for name, tensor in (("k_dim", k), ("v_dim", v)):
        if tensor.shape[-1] != 128:
            return f"takes a {name} of 128, and it is {tensor.shape[-1]}"
    return None


def _why_not_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    slots: Tensor | None,
    write_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    null_slot: int,
    output: Tensor,
) -> str | None:
    if reason := _why_no_delta_rule(q, k, v, output):
        return reason
    if g is not None:
        return "computes the gates itself, from a, b, A_log and dt_bias, and g and beta are given"
    for name, gate in (("a", a), ("b", b)):
        if gate is not None and gate.dtype != q.dtype:
            return f"takes {name} in q's bfloat16, and it is {short(gate.dtype)}"
    if state.dtype not in (torch.float32, torch.bfloat16):
        return f"takes a float32 or bfloat16 state, and it is {short(state.dtype)}"
    if cu_seqlens is not None:
        return "takes no packed rows"
    if num_accepted_tokens is not None:
        return "does no speculative decoding"
    if write_slots is not None and slots is None:
        return "takes write_slots together with slots"
    if _needs_spare_slot(state, slots, write_slots) and null_slot != 0:
        return (
            "runs rows that are nobody in slot 0 where the state is bfloat16 or there are write slots, and null_slot "
            f"is {null_slot}; keep slot 0 free and say null_slot=0"
        )
    return None


def _needs_spare_slot(state: Tensor, slots: Tensor | None, write_slots: Tensor | None) -> bool:
    """Whether the vendor takes slot 0 for every negative slot, and so reads and writes it."""
    return write_slots is not None or (slots is not None and state.dtype == torch.bfloat16)


def _why_not_delta_rule_update_now(state: Tensor, output: Tensor) -> str | None:
    if not state[:1].is_contiguous():
        return f"takes a state whose slots are each dense, and its strides are {state.stride()}"
    if (state.data_ptr() | state.stride(0) * state.itemsize) & 31:
        return "takes a state whose slots start at multiples of 32 bytes, and not all of them do"
    if not output.is_contiguous() or output.data_ptr() & 31:
        return "takes an out that is contiguous and starts at a multiple of 32 bytes"
    return None


@flashinfer.implements(
    gated_delta_rule_update, unless=_why_not_delta_rule_update, per_call=_why_not_delta_rule_update_now
)
def _gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    """Takes bfloat16 with a k_dim and a v_dim of 128, a float32 or bfloat16 state, and gates that it computes; one
    token a row or a few, neither packed nor speculative. Needs nvidia-cutlass-dsl.

    Where the state is bfloat16 and has slots, or there are write slots, rows that are nobody run in slot 0, which is
    then scratch: null_slot must be 0.
    """
    from flashinfer.gdn_decode import gated_delta_rule_decode_pretranspose as kernel

    rows = v.shape[0]
    if output.numel() == 0:
        return
    source = target = None
    if slots is not None:
        source = cleaned(first_column(slots, rows), null_slot)
    if source is not None and write_slots is not None:
        target = cleaned(first_column(write_slots, rows), null_slot)
        target = torch.where(nobody(source), 0, target).clamp_min(0)
    indices = torch.arange(rows, dtype=torch.int32, device=v.device) if source is None else source
    if _needs_spare_slot(state, slots, write_slots):
        indices = indices.clamp_min(0)

    def tokens(tensor: Tensor | None) -> Tensor | None:
        """(rows, length, ...), dense."""
        return None if tensor is None else (tensor if v.dim() == 4 else tensor.unsqueeze(1)).contiguous()

    kernel(
        tokens(q),
        tokens(k),
        tokens(v),
        None,
        None if A_log is None else A_log.float().contiguous(),
        tokens(a),
        None if dt_bias is None else dt_bias.float().contiguous(),
        tokens(b),
        scale=scale,
        output=output if v.dim() == 4 else output.unsqueeze(1),
        use_qk_l2norm=qk_l2norm,
        initial_state=state,
        initial_state_indices=indices,
        output_state_indices=target,
        backend="flashinfer",
    )
    if source is not None:
        output.masked_fill_(nobody(source, output.dim()), 0)


def _why_not_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float | None, output: Tensor) -> str | None:
    if scale == 0:
        return "takes a scale of 0 for none given"
    return "takes at least one token, and there is none" if v.numel() == 0 else _why_no_delta_rule(q, k, v, output)


def _why_not_chunk_now(output: Tensor) -> str | None:
    if not output.is_contiguous() or output.data_ptr() & 15:
        return "takes an out that is contiguous and starts at a multiple of 16 bytes"
    return None


@flashinfer.implements(chunk_gated_delta_rule, unless=_why_not_chunk, per_call=_why_not_chunk_now)
def _chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    qk_l2norm: bool = False,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    """Takes bfloat16 with a k_dim and a v_dim of 128. Needs nvidia-cutlass-dsl.

    The rows' states go through float32 copies: the vendor's own slots know neither rows that are nobody nor write
    slots.
    """
    from flashinfer.gdn_prefill import chunk_gated_delta_rule as kernel

    rows = row_count(v, cu_seqlens)
    if rows == 0:
        return
    if cu_seqlens is None:
        ends = torch.arange(rows + 1, dtype=torch.int32, device=v.device) * v.shape[1]
        q, k, v, g, beta = (tensor.flatten(0, 1) for tensor in (q, k, v, g, beta))
    else:
        ends = cu_seqlens.to(torch.int32).contiguous()
    written = output if cu_seqlens is not None else output.flatten(0, 1)
    empty = ends.diff() == 0
    states = row_ends(slots, write_slots, null_slot, empty, None)
    initial = v.new_zeros(rows, *v.shape[1:], k.shape[-1], dtype=torch.float32)
    if state is not None and has_initial_state is not None:
        initial = initial_states(state, states, has_initial_state, torch.float32)
    last = torch.empty_like(initial)
    kernel(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        g.float().exp().contiguous(),
        beta.float().contiguous(),
        scale=scale,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=ends,
        use_qk_l2norm_in_kernel=qk_l2norm,
        output=written,
        output_state=last,
        use_cp=False,  # with it, the number of rows would decide on how a row is computed
        backend="flashinfer",
    )
    row, inside = row_of_tokens(ends, written.shape[0])
    if slots is not None:
        written.masked_fill_((~states.somebody[row] & inside).view(-1, 1, 1), 0)
    if state is not None:
        store_rows(state, states.target, torch.where(empty.view(-1, 1, 1, 1), initial, last), states.stored)
