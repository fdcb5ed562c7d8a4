"""The layers under DDP and FSDP2 on two ranks: the gradients of the whole batch in one process."""

from pathlib import Path

import pytest
import torch

from tests.training.on_two_ranks import WORLD, on_a_rank

pytestmark = pytest.mark.slow


# DDP splits a compiled graph at its buckets, and torch's partitioner then fails on checkpointed regions in it.
CASES = [("ddp", False, True), ("ddp", True, False), ("fsdp2", False, True), ("fsdp2", True, True)]


@pytest.mark.parametrize(("kind", "compiled", "checkpointed"), CASES)
def test_two_ranks_are_as_one(kind: str, compiled: bool, checkpointed: bool, tmp_path: Path) -> None:
    args = (str(tmp_path / "store"), kind, compiled, checkpointed)
    torch.multiprocessing.spawn(on_a_rank, args=args, nprocs=WORLD)
