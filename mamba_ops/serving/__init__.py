"""What an inference engine needs around the mixing ops."""

from mamba_ops.ops._common.sequences import PlanTensors as PlanTensors
from mamba_ops.serving.capture import DeviceGraphs as DeviceGraphs
from mamba_ops.serving.capture import Graphs as Graphs
from mamba_ops.serving.capture import graphs_of as graphs_of
from mamba_ops.serving.context import ForwardContext as ForwardContext
from mamba_ops.serving.context import current_context as current_context
from mamba_ops.serving.context import forward_context as forward_context
from mamba_ops.serving.pieces import Piece as Piece
from mamba_ops.serving.piecewise import PiecewiseBackend as PiecewiseBackend
from mamba_ops.serving.plan import Plan as Plan
from mamba_ops.serving.pools import NoFreeSlot as NoFreeSlot
from mamba_ops.serving.pools import StatePool as StatePool
from mamba_ops.serving.prefixes import PrefixCache as PrefixCache
from mamba_ops.serving.runner import CAPTURE_SIZES as CAPTURE_SIZES
from mamba_ops.serving.runner import PiecewiseRunner as PiecewiseRunner
