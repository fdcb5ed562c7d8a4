"""The backward pass of chunk_kda in plain torch: the reference, which runs on any device."""

from mamba_ops.ops._common.delta_rule import BackwardArguments
from mamba_ops.ops._common.delta_rule_backward import write_gradients
from mamba_ops.ops.chunk_kda.reference import ChannelDecays


def chunk_kda_backward(call: BackwardArguments) -> None:
    """Write the gradients of every input of chunk_kda; that of an initial state that is None is not touched.

    See `write_gradients` for the formulas; products and decays of tokens are sums over the channels of keys there.
    """
    write_gradients(call, ChannelDecays)
