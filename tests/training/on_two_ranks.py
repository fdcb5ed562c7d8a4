"""One of two ranks that train a layer of every kind; for child processes of test_distributed."""

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mamba_ops import distributed, training
from tests.layers import HIDDEN, KINDS, new_layer

WORLD = 2


class Stack(nn.Module):
    """One layer of every kind, with residuals; with checkpointing, what the ops return is saved."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(new_layer(name, torch.device("cpu")) for name in KINDS)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, training.save_ops())
        for mixer in self.mixers:
            x = x + (checkpoint(mixer, x, use_reentrant=False, context_fn=contexts) if self.checkpointed else mixer(x))
        return x


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def on_a_rank(rank: int, store: str, kind: str, compiled: bool, checkpointed: bool) -> None:
    """Train one step on this rank's half of the batch, and compare its gradients with those of the batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        torch.manual_seed(0)
        model, x = Stack(checkpointed), torch.randn(4, 17, HIDDEN)
        model(x).square().mean().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        wrapped: nn.Module = model
        if compiled:
            for mixer in model.mixers:
                mixer.compile(fullgraph=True, backend="aot_eager")
        if kind == "ddp":
            if compiled and checkpointed:  # DDP would cut a region that is checkpointed at its buckets
                torch._dynamo.config.optimize_ddp = False
            wrapped = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (WORLD,))
            shard: Any = fully_shard if kind == "fsdp2" else distributed.fully_shard
            for mixer in model.mixers:
                shard(mixer, mesh=mesh, mp_policy=MixedPrecisionPolicy())
            fully_shard(model, mesh=mesh)
        wrapped(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        assert len(expected) > 10
        for name, p in model.named_parameters():
            name = name.replace("decays.", "")
            torch.testing.assert_close(whole(p.grad), expected[name], msg=lambda m, name=name: f"{name}: {m}")
        # Where DDP's reducer frees gloo's group last, that waits for a thread which waits for the GIL, for ever.
        dist.barrier()
        os._exit(0)
    finally:
        dist.destroy_process_group()
