"""Decode with the gated delta rule: one step of the recurrence, or a few, for every row of a batch.

The state stays in the caller's cache; slot tables say which entry each row reads and which it writes.
"""

from mamba_ops.ops.gated_delta_rule_update import bench as bench
from mamba_ops.ops.gated_delta_rule_update import samples as samples
from mamba_ops.ops.gated_delta_rule_update.op import gated_delta_rule_update as gated_delta_rule_update
