"""mamba3_state_update: a decode step of Mamba-3's recurrence."""

from mamba_ops.ops.mamba3_state_update import bench as bench
from mamba_ops.ops.mamba3_state_update import samples as samples
from mamba_ops.ops.mamba3_state_update.op import mamba3_state_update as mamba3_state_update
