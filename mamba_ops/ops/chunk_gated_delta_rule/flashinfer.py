"""The gated delta rule on FlashInfer's kernels, which are written in nvidia-cutlass-dsl."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mamba_ops.backends.flashinfer import dense
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.slots import initial_states, row_ends, row_of_tokens, store_rows
from mamba_ops.ops.gated_delta_rule_update.flashinfer import unsupported_by_both

if TYPE_CHECKING:
    from mamba_ops.ops.chunk_gated_delta_rule.op import Arguments


def unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float | None, output: Tensor) -> str | None:
    if scale == 0:
        return "takes a scale of 0 for none given"
    return "takes at least one token, and there is none" if v.numel() == 0 else unsupported_by_both(q, k, v, output)


def unsupported_layout(output: Tensor) -> str | None:
    if not output.is_contiguous() or output.data_ptr() & 15:
        return "takes an out that is contiguous and starts at a multiple of 16 bytes"
    return None


class Packed(NamedTuple):
    """A call as FlashInfer's kernels for whole sequences take it: its tokens packed, its states gathered."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor  # float32, as is beta
    beta: Tensor
    initial: Tensor  # float32, (n, v_heads, v_dim, k_dim), as is last
    ends: Tensor
    written: Tensor
    last: Tensor


def run_packed(call: "Arguments", kernel: Callable[[Packed], object]) -> None:
    """Run a kernel that writes the outputs of packed tokens and the last states of their rows."""
    q, k, v, g, beta = call.q, call.k, call.v, call.g, call.beta
    rows = row_count(v, call.cu_seqlens)
    if rows == 0:
        return
    if call.cu_seqlens is None:
        ends = torch.arange(rows + 1, dtype=torch.int32, device=v.device) * v.shape[1]
        q, k, v, g, beta = (tensor.flatten(0, 1) for tensor in (q, k, v, g, beta))
    else:
        ends = call.cu_seqlens.to(torch.int32).contiguous()
    written = call.output if call.cu_seqlens is not None else call.output.flatten(0, 1)
    empty = ends.diff() == 0
    states = row_ends(call.slots, call.write_slots, call.null_slot, empty, call.ssm_state)
    initial = v.new_zeros(rows, *v.shape[1:], k.shape[-1], dtype=torch.float32)
    if call.ssm_state is not None and call.has_initial_state is not None:
        initial = initial_states(call.ssm_state, states, call.has_initial_state, torch.float32)
    last = torch.empty_like(initial)
    q, k, v, g, beta = (dense(tensor) for tensor in (q, k, v, g.float(), beta.float()))
    kernel(Packed(q, k, v, g, beta, initial, ends, written, last))
    row, inside = row_of_tokens(ends, written.shape[0])
    if call.slots is not None:
        written.masked_fill_((~states.is_active[row] & inside).view(-1, 1, 1), 0)
    if call.ssm_state is not None:
        store_rows(call.ssm_state, states.target, torch.where(empty.view(-1, 1, 1, 1), initial, last), states.stored)


def chunk_gated_delta_rule(call: "Arguments") -> None:
    """Takes bfloat16 with a k_dim and a v_dim of 128. Needs nvidia-cutlass-dsl.

    States go through float32 copies: FlashInfer's own slot table has neither padding nor write slots.
    """
    from flashinfer.gdn_prefill import chunk_gated_delta_rule as kernel

    def run(packed: Packed) -> None:
        kernel(
            packed.q,
            packed.k,
            packed.v,
            packed.g.exp(),
            packed.beta,
            scale=call.scale,
            initial_state=packed.initial,
            output_final_state=True,
            cu_seqlens=packed.ends,
            use_qk_l2norm_in_kernel=call.qk_l2norm,
            output=packed.written,
            output_state=packed.last,
            use_cp=False,  # with it, how a row is computed would depend on the number of rows
            backend="flashinfer",
        )

    run_packed(call, run)
