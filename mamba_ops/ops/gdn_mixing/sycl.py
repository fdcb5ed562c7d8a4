"""Adapter of Intel's SYCL kernel for the mixing of a gated delta net layer, from vllm_xpu_kernels."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import short
from mamba_ops.ops._common.mixing import batch_of
from mamba_ops.ops._common.slots import is_padding

if TYPE_CHECKING:
    from mamba_ops.ops.gdn_mixing.op import Arguments


def _arguments() -> list[str] | None:
    """Return the names of the vendor's arguments, or None where the installed package has no such op."""
    if not hasattr(torch.ops._xpu_C, "gdn_attention"):
        return None
    return [argument.name for argument in torch.ops._xpu_C.gdn_attention.default._schema.arguments]


def unsupported(call: "Arguments") -> str | None:
    arguments = _arguments()
    if arguments is None:
        return "the installed vllm_xpu_kernels has no gdn_attention"
    if "reorder_input" not in arguments:
        return "the installed vllm_xpu_kernels is older than 0.1.4"
    if call.num_accepted_tokens is not None and "num_spec_decodes" not in arguments:
        return "the installed vllm_xpu_kernels does no speculative decoding; 0.1.9 does"
    if call.projected_qkvz.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, and projected_qkvz is {short(call.projected_qkvz.dtype)}"
    alike = {
        "projected_ba": call.projected_ba,
        "conv_state": call.conv_state,
        "conv_weight": call.conv_weight,
        "conv_bias": call.conv_bias,
    }
    for name, tensor in {**alike, "out": call.output}.items():
        if tensor is not None and tensor.dtype != call.projected_qkvz.dtype:
            return (
                f"takes {name} in projected_qkvz's {short(call.projected_qkvz.dtype)}, and it is {short(tensor.dtype)}"
            )
    if call.state_scale is not None:
        return f"takes states of 16-bit floats and wider ones, and ssm_state is {short(call.ssm_state.dtype)}"
    if call.ssm_state.dtype == torch.float64:
        return "computes in float32, and ssm_state is float64"
    if call.head_k_dim not in (32, 64, 128, 256):
        return f"takes a head_k_dim of 32, 64, 128 or 256, and it is {call.head_k_dim}"
    if call.head_v_dim % 32:
        return f"takes a head_v_dim that 32 divides, and it is {call.head_v_dim}"
    if call.num_v_heads % 4:
        return f"takes a num_v_heads that 4 divides, and it is {call.num_v_heads}"
    width = call.conv_weight.shape[1]
    if width > 5:
        return f"takes a convolution of width 5 at most, and conv_weight has {width}"
    if call.conv_state.shape[2] != width - 1:
        # In speculative decoding it keeps a window in the slot of every column; other backends keep one long window in
        # column 0.
        return f"keeps {width - 1} inputs in every slot, and conv_state has a state_len of {call.conv_state.shape[2]}"
    if call.write_slots is not None:
        return "leaves a state where it came from, and write_slots has others"
    if call.counts is not None and call.counts.shape[0] != 4:
        return f"reads prompts in one round, and counts has {call.counts.shape[0] // 2 - 1}"
    if call.counts is not None and call.null_slot < 0:
        return f"runs padding rows in a spare slot, and null_slot is {call.null_slot}; use a slot of the caches"
    if call.counts is not None and call.null_slot >= call.conv_state.shape[0]:
        slots = call.conv_state.shape[0]
        return f"runs padding rows in a spare slot, and null_slot is {call.null_slot} of {slots} slots"
    return None


def unsupported_layout(call: "Arguments") -> str | None:
    if not call.conv_state[:1].transpose(1, 2).is_contiguous():
        return "takes a conv_state with adjacent channels, a view (slots, state_len, dim) transposed"
    if not call.ssm_state[:1].is_contiguous():
        return "takes an ssm_state with contiguous slots"
    if call.counts is not None and call.slots is not None and call.num_accepted_tokens is not None:
        columns = 1 if call.slots.dim() == 1 else call.slots.shape[1]
        decodes, tokens = call.counts[:2].tolist()
        if tokens != decodes * columns:
            return f"takes {columns} tokens of every speculative decode, and {decodes} have {tokens}"
    return None


class _Rows(NamedTuple):
    """Rows of one kind, as the vendor's kernel takes them."""

    ends: Tensor
    slots: Tensor
    is_padding: Tensor


def _rows(ends: Tensor, slots: Tensor, source: Tensor, null_slot: int) -> _Rows:
    """Give padding rows and empty rows the null slot: the vendor's recurrence stores a state for every row."""
    padding = is_padding(source, null_slot)
    spare = (padding | (ends[1:] == ends[:-1])).view(-1, *[1] * (slots.dim() - 1)) | (slots < 0)
    return _Rows(_indices(ends), _indices(torch.where(spare, null_slot, slots)), padding)


def _indices(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


def window(num_accepted_tokens: Tensor | None) -> str | None:
    return None if num_accepted_tokens is None else "a window of width - 1 inputs in the slot of every column"


def gdn_mixing(call: "Arguments") -> None:
    """Takes float16 and bfloat16, a head_k_dim of 32, 64, 128 or 256, conv_state of width - 1, and a null_slot >= 0.

    The null slot is scratch: padding rows and empty rows are run there. Speculative decodes keep the window of the
    convolution after token t in the slot of column t, so a request cannot move to another backend, and all of them have
    as many tokens as slots has columns. dt_bias is rounded to the projections' dtype.
    """
    total = batch_of("mamba_ops::gdn_mixing", call, call.projected_qkvz.shape[0]).tokens
    call.output[total:].zero_()
    if call.z is not None:
        call.z[total:].zero_()
    if (
        not total
        or call.counts is None
        or call.cu_seqlens is None
        or call.prefill_cu_seqlens is None
        or call.slots is None
    ):
        return  # for mypy: with tokens the plan is complete
    assert call.has_initial_state is not None
    decodes, decode_tokens, prefills, _ = call.counts.tolist()
    table = call.slots.unsqueeze(1) if call.slots.dim() == 1 else call.slots
    dtype, device = call.projected_qkvz.dtype, call.projected_qkvz.device
    speculative = call.num_accepted_tokens is not None and decodes > 0

    # Rows that are not speculative: the prefills, and the decodes before them unless these are speculative. Without
    # such rows the vendor's arguments for them are None.
    first, rows = decodes if speculative else 0, decodes + prefills
    ends = (call.prefill_cu_seqlens if speculative else call.cu_seqlens)[: rows - first + 1]
    plain = _rows(ends, table[first:rows, 0], table[first:rows, 0], call.null_slot)
    begins = None
    if prefills:
        begins = call.has_initial_state[first:rows].clone()
        begins[: decodes - first].fill_(True)
    some = plain if rows > first else None
    vendor = {
        "num_prefills": prefills,
        "num_decodes": decodes - first,
        "has_initial_state": begins,
        "non_spec_query_start_loc": None if some is None else some.ends,
        "non_spec_state_indices_tensor": None if some is None else some.slots,
    }
    padding = plain.is_padding
    if "num_spec_decodes" in (_arguments() or ()):
        vendor |= dict.fromkeys(
            ("non_spec_token_indx", "spec_query_start_loc", "spec_token_indx", "spec_state_indices_tensor")
        )
        vendor |= {"num_spec_decodes": 0, "num_accepted_tokens": None}
    if speculative:
        assert call.num_accepted_tokens is not None
        accepted, columns = call.num_accepted_tokens[:decodes], table[:decodes]
        last = (accepted.long() - 1).clamp(0, columns.shape[1] - 1).unsqueeze(1)
        guessing = _rows(call.cu_seqlens[: decodes + 1], columns, columns.gather(1, last).squeeze(1), call.null_slot)
        tokens = torch.arange(total, dtype=torch.int32, device=device)
        vendor |= {
            "num_spec_decodes": decodes,
            "non_spec_token_indx": None if some is None else tokens[decode_tokens:],
            "spec_query_start_loc": guessing.ends,
            "spec_token_indx": tokens[:decode_tokens],
            "spec_state_indices_tensor": guessing.slots,
            "num_accepted_tokens": _indices(accepted),
        }
        padding = torch.cat([guessing.is_padding, padding])

    def fit(tensor: Tensor | None) -> Tensor:
        """Return an output for the vendor's op: the tensor itself, if it is contiguous and of the right dtype."""
        if tensor is not None and tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        return torch.empty(call.output.shape, dtype=dtype, device=device)

    core, gate = fit(call.output), fit(call.z)
    torch.ops._xpu_C.gdn_attention(
        core_attn_out=core,
        z=gate,
        projected_states_qkvz=call.projected_qkvz.contiguous(),
        projected_states_ba=call.projected_ba.contiguous(),
        num_k_heads=call.num_k_heads,
        num_v_heads=call.num_v_heads,
        head_k_dim=call.head_k_dim,
        head_v_dim=call.head_v_dim,
        conv_state=call.conv_state.transpose(1, 2),
        ssm_state=call.ssm_state,
        conv_weights=call.conv_weight.contiguous(),
        conv_bias=None if call.conv_bias is None else call.conv_bias.contiguous(),
        activation="silu",
        A_log=call.A_log.float().contiguous(),
        dt_bias=call.dt_bias.to(dtype).contiguous(),
        num_actual_tokens=total,
        tp_size=1,
        reorder_input=not call.interleaved,
        **vendor,
    )
    # The row of each token, without waiting for the device.
    row = torch.searchsorted(
        call.cu_seqlens[1 : rows + 1], torch.arange(total, device=device, dtype=call.cu_seqlens.dtype), right=True
    )
    core[:total].masked_fill_(padding[row].view(-1, 1, 1), 0)
    if core is not call.output:
        call.output[:total].copy_(core[:total])
    if call.z is not None and gate is not call.z:
        call.z[:total].copy_(gate[:total])
