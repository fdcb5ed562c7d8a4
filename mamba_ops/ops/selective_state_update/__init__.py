"""Decode for Mamba-1 and Mamba-2: one step of the selective state space recurrence, or a few, for every row of a batch.

The state stays in the caller's cache; slot tables say which entry each row reads and which it writes.
"""

from mamba_ops.ops.selective_state_update import bench as bench
from mamba_ops.ops.selective_state_update import samples as samples
from mamba_ops.ops.selective_state_update.op import selective_state_update as selective_state_update
