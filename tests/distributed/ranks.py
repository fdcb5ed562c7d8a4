"""Runs a test's body on several ranks, each a process of its own that speaks gloo."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def run_on(ranks: int, body: Callable[..., None], *args: Any) -> None:
    """Run `body(rank, *args)` on every rank; raise AssertionError with the first traceback of those that fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_enter, (ranks, port, body, args), nprocs=ranks)


def _enter(rank: int, ranks: int, port: int, body: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    try:
        torch.manual_seed(0)
        body(rank, *args)
    finally:
        dist.destroy_process_group()


@contextmanager
def single_mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
