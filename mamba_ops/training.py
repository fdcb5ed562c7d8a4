"""What a training loop tells torch about the ops: which to save under checkpointing, and how many FLOPs they make.

Importing this module registers the ops' formulas with `torch.utils.flop_counter`, so that a `FlopCounterMode` counts
them. The first trace by torch.compile does that too; AOTAutograd's partitioner goes by them under a memory budget.
"""

from mamba_ops.registry import flop_formulas as flop_formulas
from mamba_ops.registry import register_flop_formulas
from mamba_ops.registry import save_ops as save_ops

register_flop_formulas()
