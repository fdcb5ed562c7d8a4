"""Ways in which an argument of a call may be changed, legal or not, whatever the argument means."""

import functools
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

Arguments = dict[str, Any]
Pick = Callable[[int], int]
"""Draws a number from 0 up to, and without, the given one."""


def plain(value: Any) -> Any:
    """Return a tensor's numbers as a tensor of torch's own; anything else as it is."""
    return value.full_tensor() if isinstance(value, Tensor) and hasattr(value, "full_tensor") else value


def mutate(arguments: Arguments, name: str, pick: Pick) -> str | None:
    """Change one argument in place; return what was done, None if there was nothing to do."""
    value = arguments[name]
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        return None  # changed already; torch's own as_strided of an MKL-DNN tensor writes outside its memory
    if isinstance(value, Tensor):
        kinds: list[dict[str, Callable[..., Any]]] = [TABLES, VALUES, SHAPES, LAYOUTS, DTYPES, KINDS, TYPES]
        kinds.remove(TABLES if value.is_floating_point() or not value.numel() else VALUES)
        table = kinds[pick(len(kinds))]
        what = [*table][pick(len(table))]
        changed = table[what](value, pick)
    elif value is None:
        tensors = [n for n, other in arguments.items() if isinstance(other, Tensor)]
        what = tensors[pick(len(tensors))] if tensors else "three"
        changed = arguments[what].clone() if tensors else 3
    else:
        what, changed = "a number", NUMBERS[pick(len(NUMBERS))]
        if changed is None or type(changed) is type(value):
            what = "a number of its type"
    if what == "another's memory":
        others = [n for n, o in arguments.items() if isinstance(o, Tensor) and n != name and o.dtype == value.dtype]
        if not others:
            return None
        other = others[pick(len(others))]
        what, changed = f"the memory of {other}", in_memory_of(arguments[other], value)
    arguments[name] = changed
    return f"{name}: {what}"


def in_memory_of(other: Tensor, like: Tensor) -> Tensor:
    """Return a tensor of one shape in another's memory, if it fits; else the other itself."""
    # Of a DTensor without numbers torch looks for a view for ever.
    fits = type(other) is Tensor and other.is_contiguous() and other.numel() >= like.numel()
    return other.view(-1)[: like.numel()].view(like.shape) if fits else other


def _entry(value: Callable[[Tensor, Pick], float]) -> Callable[[Tensor, Pick], Tensor]:
    def change(tensor: Tensor, pick: Pick) -> Tensor:
        changed = tensor.clone()
        if changed.numel():
            changed.view(-1)[pick(changed.numel())] = value(tensor, pick)
        return changed

    return change


def _other_size(tensor: Tensor, pick: Pick) -> Tensor:
    if not tensor.dim():
        return tensor[None]
    dim = pick(tensor.dim())
    sizes = [0, 1, max(0, tensor.shape[dim] - 1), tensor.shape[dim] + 1, 2 * tensor.shape[dim]]
    size = sizes[pick(len(sizes))]
    if size <= tensor.shape[dim]:
        return tensor.narrow(dim, 0, size).clone()
    return torch.cat([tensor, tensor.narrow(dim, 0, min(size - tensor.shape[dim], tensor.shape[dim]))], dim)


def _strided(tensor: Tensor, pick: Pick) -> Tensor:
    """Return the same values with gaps between them, from an offset on."""
    buffer = torch.zeros(2 * tensor.numel() + 3, dtype=tensor.dtype)
    view = buffer[3:].as_strided(tensor.shape, [2 * step for step in tensor.contiguous().stride()])
    return view.copy_(tensor)


def _permuted(tensor: Tensor, pick: Pick) -> Tensor:
    """Return the same values with axes in another order in memory."""
    if tensor.dim() < 2:
        return tensor
    first = pick(tensor.dim() - 1)
    return tensor.transpose(first, -1).contiguous().transpose(first, -1)


def _overlapping(tensor: Tensor, pick: Pick) -> Tensor:
    steps = [max(step - 1, 1) for step in tensor.contiguous().stride()]
    return tensor.new_zeros(tensor.numel() + 1).as_strided(tensor.shape, steps)


def _in_inference_mode(tensor: Tensor, pick: Pick) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _nested(tensor: Tensor, pick: Pick) -> Any:
    return torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged) if tensor.dim() else [tensor]


def _distributed(tensor: Tensor, pick: Pick) -> Tensor:
    """Return a DTensor over the one rank of this process."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    split = Shard(pick(tensor.dim())) if tensor.dim() and pick(2) else Replicate()
    return distribute_tensor(tensor, _mesh(), [split])


@functools.cache
def _mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return DeviceMesh("cpu", [0])


class Tagged(Tensor):
    """A tensor subclass without rules of its own."""


_Change = Callable[[Tensor, Pick], Any]

TABLES: dict[str, _Change] = {
    "a small entry": _entry(lambda t, pick: pick(4)),
    "a negative entry": _entry(lambda t, pick: -1 - pick(3)),
    "a larger entry": _entry(lambda t, pick: int(t.max()) + 1 + pick(3)),
    "a huge entry": _entry(lambda t, pick: (1000, 2**31 - 1)[pick(2)]),
    "sorted downwards": lambda t, pick: t.flatten().sort(descending=True).values.view(t.shape),
    "one more everywhere": lambda t, pick: t + 1 if t.dtype != torch.bool else ~t,
    "one less everywhere": lambda t, pick: t - 1 if t.dtype != torch.bool else ~t,
}
VALUES: dict[str, _Change] = {
    "zeros": lambda t, pick: torch.zeros_like(t),
    "a zero": _entry(lambda t, pick: 0.0),
    "an infinity": _entry(lambda t, pick: (float("inf"), -float("inf"))[pick(2)]),
    "a NaN": _entry(lambda t, pick: float("nan")),
    "a large number": _entry(lambda t, pick: (3e4, -3e4, 1e12, -1e12)[pick(4)]),
    "a tiny number": _entry(lambda t, pick: (1e-30, -1e-40)[pick(2)]),
    "negative": lambda t, pick: -t,
    "a thousand times as much": lambda t, pick: 1000 * t,
}
SHAPES: dict[str, _Change] = {
    "another size": _other_size,
    "an axis more": lambda t, pick: t.unsqueeze(pick(t.dim() + 1)),
    "an axis less": lambda t, pick: t[0] if t.dim() and t.shape[0] else t.flatten(),
    "axes swapped": lambda t, pick: t.transpose(0, -1) if t.dim() > 1 else t.flip(0) if t.dim() else t,
    "no axis": lambda t, pick: t.new_zeros(()),
    "empty": lambda t, pick: t.new_zeros(0),
}
LAYOUTS: dict[str, _Change] = {
    "gaps": _strided,
    "axes in another order": _permuted,
    "rows that are one": lambda t, pick: t[:1].clone().expand(t.shape) if t.dim() else t,
    "rows that overlap": _overlapping,
    "another's memory": lambda t, pick: t,
}
DTYPES: dict[str, _Change] = {
    str(dtype): lambda t, pick, dtype=dtype: t.to(dtype)
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.complex64,
    )
}
KINDS: dict[str, _Change] = {
    "on meta": lambda t, pick: t.to("meta"),
    "sparse": lambda t, pick: t.to_sparse(),
    "quantized": lambda t, pick: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": _nested,
    "negated": lambda t, pick: torch._neg_view(t) if t.is_floating_point() and t.itemsize > 1 else -t.int(),
    "imaginary part of a conjugate": lambda t, pick: torch.conj(t.to(torch.complex64)).imag,
    "fake": lambda t, pick: FakeTensorMode().from_tensor(t),
    "distributed": _distributed,
    "compressed": lambda t, pick: t.to_sparse_csr() if t.dim() == 2 else t.to_mkldnn() if t.is_floating_point() else t,
    "of inference mode": _in_inference_mode,
    "a parameter": lambda t, pick: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "a subclass": lambda t, pick: t.as_subclass(Tagged),
}
TYPES: dict[str, _Change] = {
    "None": lambda t, pick: None,
    "a list": lambda t, pick: t.flatten()[:4].tolist(),
    "of numpy": lambda t, pick: np.zeros(tuple(t.shape)),
    "a number": lambda t, pick: 0.5,
    "a string": lambda t, pick: "x",
    "a device": lambda t, pick: t.device,
    "a module": lambda t, pick: torch.nn.Identity(),
    "a list of tensors": lambda t, pick: [t, t],
}
NUMBERS: list[Any] = [
    *(-1, 0, 1, 2, 3, 4, 16, 100, 5000, 2**31, 2**63 - 1, 2**64, -(2**63)),
    *(0.5, 2.0, -1.0, 1e4, float("nan"), float("inf"), -float("inf")),
    *(2**62, -(2**31) - 1, 2**32, 1e308, -0.0, 1j),
    *(True, False, None, "x", "silu", [1], (0.0, 1.0), {}, object, torch.float32, Fraction(1, 2), Decimal(2)),
    *(np.int64(2), np.float32(0.5), np.zeros(2), torch.tensor(2), torch.tensor(0.5), torch.zeros(2)),
]


def names_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that can be changed."""
    return sorted(arguments)
