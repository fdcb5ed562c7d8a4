"""Intel's SYCL kernel for a whole gated delta net layer's mixing, out of vllm_xpu_kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops import gdn_mixing
from mamba_ops.ops.checking import short
from mamba_ops.ops.mixing import PlanTensors, batch_of
from mamba_ops.registry import Backend

sycl = Backend("sycl", devices=("xpu",), requires="vllm_xpu_kernels._xpu_C", install="vllm_xpu_kernels", priority=30)


def _arguments() -> list[str] | None:
    """Return the names of the vendor's arguments, or None where the installed package has no such op."""
    if not hasattr(torch.ops._xpu_C, "gdn_attention"):
        return None
    return [argument.name for argument in torch.ops._xpu_C.gdn_attention.default._schema.arguments]


def _why_not(
    projected_qkvz: Tensor,
    projected_ba: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ssm_state: Tensor,
    counts: Tensor | None,
    num_accepted_tokens: Tensor | None,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    null_slot: int,
    output: Tensor,
) -> str | None:
    arguments = _arguments()
    if arguments is None:
        return "the installed vllm_xpu_kernels has no gdn_attention"
    if "reorder_input" not in arguments:
        return "the installed vllm_xpu_kernels is older than 0.1.4"
    if num_accepted_tokens is not None and "num_spec_decodes" not in arguments:
        return "the installed vllm_xpu_kernels does no speculative decoding; 0.1.9 does"
    if projected_qkvz.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, and projected_qkvz is {short(projected_qkvz.dtype)}"
    alike = {"projected_ba": projected_ba, "conv_state": conv_state, "conv_weight": conv_weight, "conv_bias": conv_bias}
    for name, tensor in {**alike, "out": output}.items():
        if tensor is not None and tensor.dtype != projected_qkvz.dtype:
            return f"takes {name} in projected_qkvz's {short(projected_qkvz.dtype)}, and it is {short(tensor.dtype)}"
    if ssm_state.dtype == torch.float64:
        return "computes in float32, and ssm_state is float64"
    if head_k_dim not in (32, 64, 128, 256):
        return f"takes a head_k_dim of 32, 64, 128 or 256, and it is {head_k_dim}"
    if head_v_dim % 32:
        return f"takes a head_v_dim that 32 divides, and it is {head_v_dim}"
    if num_v_heads % 4:
        return f"takes a num_v_heads that 4 divides, and it is {num_v_heads}"
    width = conv_weight.shape[1]
    if width > 5:
        return f"takes a convolution of width 5 at most, and conv_weight has {width}"
    if conv_state.shape[2] != width - 1:
        # Speculative decodes have a window in the slot of every column here, and one long window in column 0 elsewhere.
        return f"keeps {width - 1} inputs in every slot, and conv_state has a state_len of {conv_state.shape[2]}"
    if counts is not None and null_slot < 0:
        return f"runs rows that are nobody in a spare slot, and null_slot is {null_slot}; use a slot of the caches"
    if counts is not None and null_slot >= conv_state.shape[0]:
        return f"runs rows that are nobody in a spare slot, and null_slot is {null_slot} of {conv_state.shape[0]} slots"
    return None


def _why_not_now(
    conv_state: Tensor,
    ssm_state: Tensor,
    counts: Tensor | None,
    slots: Tensor | None,
    num_accepted_tokens: Tensor | None,
) -> str | None:
    if not conv_state[:1].transpose(1, 2).is_contiguous():
        return "takes a conv_state whose channels lie together, a view (slots, state_len, dim) transposed"
    if not ssm_state[:1].is_contiguous():
        return "takes an ssm_state whose slots are each contiguous"
    if counts is not None and slots is not None and num_accepted_tokens is not None:
        columns = 1 if slots.dim() == 1 else slots.shape[1]
        decodes, tokens = counts[:2].tolist()
        if tokens != decodes * columns:
            return f"takes {columns} tokens of every speculative decode, and {decodes} have {tokens}"
    return None


class _Rows(NamedTuple):
    """Rows of one kind as the vendor wants to be told of them."""

    ends: Tensor
    slots: Tensor
    nobody: Tensor


def _rows(ends: Tensor, slots: Tensor, source: Tensor, null_slot: int) -> _Rows:
    """Send rows that are nobody, or empty, to the null slot: the vendor's recurrence looks at no slot, and stores."""
    nobody = (source < 0) | (source == null_slot)
    spare = (nobody | (ends[1:] == ends[:-1])).view(-1, *[1] * (slots.dim() - 1)) | (slots < 0)
    return _Rows(_indices(ends), _indices(torch.where(spare, null_slot, slots)), nobody)


def _indices(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32).contiguous()


def _window(num_accepted_tokens: Tensor | None) -> str | None:
    return None if num_accepted_tokens is None else "a window of width - 1 inputs in the slot of every column"


@sycl.implements(gdn_mixing, unless=_why_not, per_call=_why_not_now, layouts={"conv_state": _window})
def _gdn_mixing(
    projected_qkvz: Tensor,
    projected_ba: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    prefill_cu_seqlens: Tensor | None,
    slots: Tensor | None,
    has_initial_state: Tensor | None,
    computed_tokens: Tensor | None,
    num_accepted_tokens: Tensor | None,
    num_k_heads: int,
    num_v_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    interleaved: bool,
    *,
    z: Tensor | None = None,
    null_slot: int = -1,
    output: Tensor,
) -> None:
    """Takes float16 and bfloat16, a head_k_dim of 32, 64, 128 or 256, conv_state of width - 1, and a null_slot >= 0.

    The null slot is scratch: rows that are nobody, and empty ones, are run there. Speculative decodes keep the window
    of the convolution after token t in the slot of column t, so a request cannot change over to another backend, and
    all of them have as many tokens as slots has columns. dt_bias is rounded to the projections' dtype.
    """
    plan = PlanTensors(
        counts, cu_seqlens, prefill_cu_seqlens, slots, has_initial_state, computed_tokens, num_accepted_tokens
    )
    total = batch_of(gdn_mixing.qualname, plan, projected_qkvz.shape[0], null_slot).tokens
    output[total:].zero_()
    if z is not None:
        z[total:].zero_()
    if not total or counts is None or cu_seqlens is None or prefill_cu_seqlens is None or slots is None:
        return  # mypy: with tokens there is a whole plan
    assert has_initial_state is not None
    decodes, decode_tokens, prefills, _ = counts.tolist()
    table = slots.unsqueeze(1) if slots.dim() == 1 else slots
    dtype, device = projected_qkvz.dtype, projected_qkvz.device
    speculative = num_accepted_tokens is not None and decodes > 0

    # Rows that are not speculative: the prefills, behind the decodes unless those are. None in the vendor's list: none.
    first, rows = decodes if speculative else 0, decodes + prefills
    ends = (prefill_cu_seqlens if speculative else cu_seqlens)[: rows - first + 1]
    plain = _rows(ends, table[first:rows, 0], table[first:rows, 0], null_slot)
    begins = None
    if prefills:
        begins = has_initial_state[first:rows].clone()
        begins[: decodes - first].fill_(True)
    some = plain if rows > first else None
    vendor = {
        "num_prefills": prefills,
        "num_decodes": decodes - first,
        "has_initial_state": begins,
        "non_spec_query_start_loc": None if some is None else some.ends,
        "non_spec_state_indices_tensor": None if some is None else some.slots,
    }
    nobody = plain.nobody
    if "num_spec_decodes" in (_arguments() or ()):
        vendor |= dict.fromkeys(
            ("non_spec_token_indx", "spec_query_start_loc", "spec_token_indx", "spec_state_indices_tensor")
        )
        vendor |= {"num_spec_decodes": 0, "num_accepted_tokens": None}
    if speculative:
        assert num_accepted_tokens is not None
        accepted, columns = num_accepted_tokens[:decodes], table[:decodes]
        last = (accepted.long() - 1).clamp(0, columns.shape[1] - 1).unsqueeze(1)
        guessing = _rows(cu_seqlens[: decodes + 1], columns, columns.gather(1, last).squeeze(1), null_slot)
        tokens = torch.arange(total, dtype=torch.int32, device=device)
        vendor |= {
            "num_spec_decodes": decodes,
            "non_spec_token_indx": None if some is None else tokens[decode_tokens:],
            "spec_query_start_loc": guessing.ends,
            "spec_token_indx": tokens[:decode_tokens],
            "spec_state_indices_tensor": guessing.slots,
            "num_accepted_tokens": _indices(accepted),
        }
        nobody = torch.cat([guessing.nobody, nobody])

    def fit(tensor: Tensor | None) -> Tensor:
        """What the vendor may write: the tensor itself, if it is dense and of its dtype."""
        if tensor is not None and tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        return torch.empty(output.shape, dtype=dtype, device=device)

    core, gate = fit(output), fit(z)
    torch.ops._xpu_C.gdn_attention(
        core_attn_out=core,
        z=gate,
        projected_states_qkvz=projected_qkvz.contiguous(),
        projected_states_ba=projected_ba.contiguous(),
        num_k_heads=num_k_heads,
        num_v_heads=num_v_heads,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
        conv_state=conv_state.transpose(1, 2),
        ssm_state=ssm_state,
        conv_weights=conv_weight.contiguous(),
        conv_bias=None if conv_bias is None else conv_bias.contiguous(),
        activation="silu",
        A_log=A_log.float().contiguous(),
        dt_bias=dt_bias.to(dtype).contiguous(),
        num_actual_tokens=total,
        tp_size=1,
        reorder_input=not interleaved,
        **vendor,
    )
    # Whose a token is, without waiting for the device.
    row = torch.searchsorted(
        cu_seqlens[1 : rows + 1], torch.arange(total, device=device, dtype=cu_seqlens.dtype), right=True
    )
    core[:total].masked_fill_(nobody[row].view(-1, 1, 1), 0)
    if core is not output:
        output[:total].copy_(core[:total])
    if z is not None and gate is not z:
        z[:total].copy_(gate[:total])
