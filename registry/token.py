"""The selection token: what keys a captured graph to the selection that it was captured under.

CUDA-graph recordings made by Inductor must not outlive the selection that they recorded. Inductor keys them on
symbolic sizes, so each call in a compiled graph takes a zero-element tensor, and its size names the selection: after a
swap the size is another one and Inductor records again; after a swap back it is the old one and replays.

Traced code cannot read a context variable, in which the selection of `use_backend` is. It can read an attribute of a
`threading.local`, so each thread has its tokens there, and every swap in the thread renews them. asyncio tasks share
their thread's: in a thread with a running event loop in which a backend was swapped, the tokens name no selection.
Kernels still run as selected in each task; only a recording under such a token is refused.
"""

import itertools
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba_ops.registry import _torch
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.sharding import is_distributed, register

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op
    from mamba_ops.registry.snapshot import DecisionCache, Snapshot

_FIRST = 1_000_003  # the first token's size: large and odd, so that no real size shares its symbol in a graph

_sizes: dict[Any, int] = {}  # fingerprint of a snapshot to the size of its token
_named: dict[int, "Snapshot"] = {}  # the latest snapshot with that size; tokens that name none are not in it
_next_size = itertools.count(_FIRST, 2)
_devices: list[str] = []  # those that have tokens, as attributes are called: cpu, cuda_0
_threads: dict[int, dict[str, Any]] = {}  # thread to its tokens


class _Mirror(threading.local):
    """One token per device in use, as an attribute of this thread: a graph reads an attribute as an input."""

    def __init__(self) -> None:
        with dispatcher.lock:
            alive = {thread.ident for thread in threading.enumerate()}
            for ident in [ident for ident in _threads if ident not in alive]:
                del _threads[ident]
            _threads[threading.get_ident()] = vars(self)
            _fill(vars(self), dispatcher.current())


def _size_of(snapshot: "Snapshot") -> int:
    if snapshot.token_size is None:  # kept there, as a fingerprint takes microseconds to compare
        if (size := _sizes.get(snapshot.fingerprint)) is None:
            size = _sizes[snapshot.fingerprint] = next(_next_size)
        snapshot.token_size = size
    _named[snapshot.token_size] = snapshot
    return snapshot.token_size


def _new_token(size: int, device: str) -> Tensor:
    with torch.inference_mode(False):  # graphs that train take it, too, whoever made it
        token = torch.empty((size, 0), device=device.replace("_", ":"))
    _torch.mark_dynamic(token)
    return token


_token_of_selection = cache(_new_token)


def _fill(tokens: dict[str, Any], snapshot: "Snapshot | None") -> None:
    """Give a thread the tokens of a snapshot, or of none."""
    tokens["_snapshot"] = snapshot
    if _devices:
        size, make = (next(_next_size), _new_token) if snapshot is None else (_size_of(snapshot), _token_of_selection)
        for device in _devices:
            tokens[device] = make(size, device)


_mirror = _Mirror()


def token(tensor: Tensor) -> Tensor | None:
    """Return the token of a tensor's device, for traced code; None where there can be none (export, absent devices), or
    where the tensor is a DTensor, which stands no ordinary tensor beside it.
    """
    if is_distributed(tensor):
        _register_shardings()
        return None
    name = _name(tensor.device.type, tensor.device.index)
    return None if name is None else getattr(_mirror, name)


@_torch.constant
def _register_shardings() -> None:
    register()


def renew() -> None:
    """Give all threads the tokens of what is now selected there."""
    with dispatcher.lock:
        for tokens in _threads.values():
            if (snapshot := tokens["_snapshot"]) is not None:
                _fill(tokens, dispatcher.snapshot(snapshot.active))


dispatcher.listeners.append(renew)


def follow(snapshot: "Snapshot") -> None:
    """Give this thread the tokens of what is selected in this context, after a swap in it."""
    tokens, named = vars(_mirror), None if _in_event_loop() else snapshot
    if not _devices:
        tokens["_snapshot"] = named
    elif named is None or tokens["_snapshot"] is not named:
        with dispatcher.lock:
            _fill(tokens, named)


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


def named_by(token: Tensor) -> "Snapshot | None":
    """Return the snapshot that a token names; None: it names none."""
    return _named.get(token.shape[0])


def resolve(op: "Op[...]", token: Tensor | None) -> "DecisionCache":
    """Return the decisions of an op that a call with this token goes by.

    Those of the context. But in a context without `use_backend` a token that another thread has read, or this one
    earlier, names the selection: replays and backward passes run in threads of their own.
    """
    if token is None:
        return dispatcher.decisions(op)
    mine, size, named, current = vars(_mirror), token.shape[0], named_by(token), dispatcher.current()
    is_other = named is not None and named.fingerprint != current.fingerprint
    is_mine = any(isinstance(t, Tensor) and t.shape[0] == size for t in mine.values())
    if is_other and not is_mine and not dispatcher.active.get().requests:
        return dispatcher.decisions(op, named)
    cache = dispatcher.decisions(op)
    if mine["_snapshot"] is not current and not _in_event_loop():
        follow(current)
    if not is_other:
        cache.token_size = size
    return cache


@_torch.constant
def _name(device_type: str, index: int | None) -> str | None:
    """Return the attribute that holds a device's token, making it if need be; None where there is no token.

    It runs while Dynamo traces, because the tensor must exist before the graph can take it.
    """
    if torch.compiler.is_exporting():  # it would become a constant; asked here because traced code is told True by 2.11
        return None
    if device_type != "cpu" and not torch.get_device_module(device_type).is_available():
        return None
    name = device_type if index is None else f"{device_type}_{index}"
    with dispatcher.lock:
        if name not in _devices:
            vars(_mirror)  # so that this thread is known
            _devices.append(name)
            for tokens in _threads.values():
                _fill(tokens, tokens["_snapshot"])
    return name
