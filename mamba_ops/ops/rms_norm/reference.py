"""The plain-torch kernel of rms_norm: its reference, which runs on any device."""

from mamba_ops.ops._common.norms import normalised
from mamba_ops.ops.rms_norm.op import Arguments


def rms_norm(call: Arguments) -> None:
    h, total = normalised(
        call.x,
        call.weight,
        gate=call.gate,
        residual=call.residual,
        groups=call.groups,
        eps=call.eps,
        norm_before_gate=call.norm_before_gate,
        sigmoid_gate=call.sigmoid_gate,
    )
    if call.total is not None:
        call.total.copy_(total)
    call.output.copy_(h)
