"""Decode with Kimi Delta Attention: one step of the recurrence, or a few, for every row of a batch.

The state stays in the caller's cache; slot tables say which entry each row reads and which it writes.
"""

from mamba_ops.ops.kda_update import bench as bench
from mamba_ops.ops.kda_update import samples as samples
from mamba_ops.ops.kda_update.op import kda_update as kda_update
