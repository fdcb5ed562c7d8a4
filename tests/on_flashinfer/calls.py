"""Calls of the ops in sizes that FlashInfer takes, and how one is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops import use_backend
from mamba_ops.registry import NoBackendError, Op, Sample
from tests.harness import SIZES

Calls = list[dict[str, Any]]


def samples_of(op: Op[...], **sizes: Any) -> list[Sample]:
    return op.make_samples("cpu", **SIZES["flashinfer", op.name] | sizes)


def sample_of(op: Op[...], name: str, **changes: Any) -> Sample:
    """A sample by name, with some arguments changed: to a value, or by a function of what it was."""
    sizes = {key: changes.pop(key) for key in ("dtype", "state_dtype", "heads", "groups", "dim") if key in changes}
    [sample] = [s for s in samples_of(op, **sizes) if s.name == name]
    names = [p.name for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = dict(zip(names, sample.args, strict=False)) | dict(sample.kwargs)
    for key, change in changes.items():
        arguments[key] = change(arguments.get(key)) if callable(change) else change
    return Sample(name, tuple(arguments.pop(key) for key in names), arguments)


def refused(op: Op[...], sample: Sample) -> str:
    """The sentence with which a call is refused, from the error that the user sees; nothing is touched."""
    call = sample.clone()
    with use_backend("flashinfer"), pytest.raises(NoBackendError) as raised:
        op(*call.args, **call.kwargs)
    for before, after in zip((*sample.args, *sample.kwargs.values()), (*call.args, *call.kwargs.values()), strict=True):
        assert not isinstance(before, Tensor) or torch.equal(before, after)
    return str(raised.value).splitlines()[1].removeprefix("  flashinfer  ")


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers, 8 bytes further than they may be."""
    room = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    start = (-room.data_ptr() % 64 + 8) // tensor.itemsize
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
