"""Layers over several devices: their heads split over ranks, and their decays kept in float32 under FSDP2.

`import mamba_ops.distributed` imports torch.distributed; `import mamba_ops` does not. Ops themselves run on DTensors
without it: `mamba_ops.registry.sharding`.
"""

from mamba_ops.distributed.fsdp import fully_shard as fully_shard
from mamba_ops.distributed.tensor_parallel import CheckpointMap as CheckpointMap
from mamba_ops.distributed.tensor_parallel import checkpoint_map as checkpoint_map
from mamba_ops.distributed.tensor_parallel import tensor_parallel as tensor_parallel
