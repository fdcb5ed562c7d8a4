"""The backward pass of the gated delta rule in plain torch: the reference, which runs on any device."""

from mamba_ops.ops._common.delta_rule import BackwardArguments
from mamba_ops.ops._common.delta_rule_backward import write_gradients
from mamba_ops.ops.chunk_gated_delta_rule.reference import HeadDecays


def chunk_gated_delta_rule_backward(call: BackwardArguments) -> None:
    """Write the gradients of every input of the gated delta rule; that of an initial state that is None is not touched.

    See `write_gradients` for the formulas.
    """
    write_gradients(call, HeadDecays)
