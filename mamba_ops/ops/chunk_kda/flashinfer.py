"""Prefill with Kimi Delta Attention on cuDNN's kernel, by `flashinfer.cudnn.cudnn_recurrent_kda`.

FlashInfer's other kernels for it take raw gates, of which this op gets the results, or keep no states.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from mamba_ops.backends.flashinfer import not_installed, other_than
from mamba_ops.ops.chunk_gated_delta_rule.flashinfer import Packed, run_packed
from mamba_ops.ops.gated_delta_rule_update.flashinfer import unsupported_tokens

if TYPE_CHECKING:
    from mamba_ops.ops.chunk_kda.op import Arguments


def unsupported(q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> str | None:
    if reason := other_than(10, q.device):
        return reason
    for module, package in (("cutlass", "nvidia-cutlass-dsl"), ("cudnn", "nvidia-cudnn-frontend")):
        if reason := not_installed(module, package, "KDA"):
            return reason
    return "takes at least one token, and there is none" if v.numel() == 0 else unsupported_tokens(q, k, v, output)


def chunk_kda(call: "Arguments") -> None:
    """Takes bfloat16 with a k_dim and a v_dim of 128. Needs nvidia-cudnn-frontend and nvidia-cutlass-dsl.

    States go through float32 copies, as in chunk_gated_delta_rule. FlashInfer says that within a chunk the kernel has
    the inverse of decays multiplied up, in bfloat16's range: where they are less than exp(-88) it may overflow.
    """
    from flashinfer.cudnn import cudnn_recurrent_kda as kernel

    def run(packed: Packed) -> None:
        kernel(
            packed.q,
            packed.k,
            packed.v,
            packed.g,
            packed.beta,
            scale=call.scale,
            initial_state=packed.initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=call.qk_l2norm,
            use_gate_in_kernel=False,
            cu_seqlens=packed.ends,
            beta_is_logit=False,
            output=packed.written,
            output_state=packed.last,
            batch_invariant=True,  # without it, how a row is computed would depend on the number of rows
        )

    run_packed(call, run)
