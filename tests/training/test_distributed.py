"""The layers under DDP and FSDP2 on two ranks: the gradients of the whole batch in one process."""

from pathlib import Path

import pytest
import torch

from tests.training.on_two_ranks import WORLD, on_a_rank

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 of mamba_ops.distributed"])
def test_two_ranks_are_as_one(kind: str, compiled: bool, checkpointed: bool, tmp_path: Path) -> None:
    args = (str(tmp_path / "store"), kind, compiled, checkpointed)
    torch.multiprocessing.spawn(on_a_rank, args=args, nprocs=WORLD)
