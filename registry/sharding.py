"""How ops run on tensors that are spread over devices, `torch.distributed.tensor.DTensor`.

An op that writes into what it is given cannot: torch would hand it a copy where a tensor must be laid out otherwise,
and the copy would be written. It refuses. Its functional companions run by rules, which the facet `sharding` declares:

    @scan.sharding
    def _sharding(x: Any, weight: Any) -> list[dict[str, int]]:
        return [{"x": 1, "weight": 0, "output": 1}, {"x": 0, "output": 0}]  # by channels, or by rows

Each dictionary is one way to compute a part of the result from parts of the inputs: the dimension that every input and
every result is split in. What it does not name is whole everywhere. The rules of the backward follow: a gradient is
split as its tensor is, and summed over devices where the tensor is whole.
"""

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mamba_ops.registry import codegen
from mamba_ops.registry.dispatcher import dispatcher

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op

Sharding = Mapping[str, int]

_registered: set[Any] = set()


def is_distributed(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing what that is; traced code may ask."""
    return hasattr(tensor, "device_mesh")


def refuse_distributed(op: "Op[...]", tensors: Sequence[Tensor | None]) -> None:
    """Raise ValueError if one of the tensors of a call that writes into its arguments is a DTensor."""
    for number, tensor in enumerate(tensors):
        if type(tensor) is not Tensor and tensor is not None and is_distributed(tensor):
            register()
            name = [p.name for p in op.parameters if codegen.is_tensor(p)][number]
            raise ValueError(_sentence(op, "out" if name == "output" else name))


def _sentence(op: "Op[...]", name: str) -> str:
    what_to_do = "pass each device's part, tensor.to_local(), or put the call into torch.distributed.tensor's local_map"
    if op.forward_op is not None:
        taken = ", ".join(p.name for p in op.forward_op._called if codegen.is_tensor(p))
        what_to_do = f"this op runs on DTensors where no other tensors are given than {taken}; else {what_to_do}"
    return (
        f"{op.qualname}: {name}: got a DTensor, expected an ordinary tensor: the op writes into its arguments, and "
        f"could be given a copy of a DTensor; {what_to_do}"
    )


def register() -> None:
    """Give torch the rules of all ops that have not got theirs yet, if it has loaded what takes them."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    with dispatcher.lock:
        for op in [op for op in dispatcher.ops.values() if op.overload not in _registered]:
            _registered.add(op.overload)
            _register(op)


def _register(op: "Op[...]") -> None:
    from torch.distributed.tensor.experimental import register_sharding

    if not op.returns:
        rule: Callable[..., Any] = partial(_refuse, op)
    elif (facet := op.facets.get("sharding")) is not None:
        rule = partial(_strategies, op, facet)
    else:
        return
    register_sharding(op.overload)(rule)


def _refuse(op: "Op[...]", *args: Any, **kwargs: Any) -> Any:
    raise ValueError(_sentence(op, next(p.name for p in op.parameters if codegen.is_tensor(p))))


def _strategies(
    op: "Op[...]", facet: Callable[..., Sequence[Sharding]], *args: Any
) -> list[tuple[list[Any], list[Any]]]:
    """Return what torch chooses from: the placements of the results with those of the arguments, for one mesh axis."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    names = [p.name for p in op._called]
    given = dict(zip(names, args, strict=False))
    tensors = {name: value for name, value in given.items() if hasattr(value, "placements")}
    shardings = facet(**{name: given[name] for name in inspect.signature(facet).parameters})

    def of(name: str) -> str:
        """The name of a gradient's tensor."""
        return name.removeprefix("grad_")

    strategies = []
    for sharding in ({}, *(s for s in shardings if _is_even(s, shardings, tensors, of))):

        def placed(name: str, whole: Any, sharding: Sharding = sharding) -> Any:
            return Shard(sharding[of(name)]) if of(name) in sharding else whole

        summed = Partial() if sharding else Replicate()
        results = []
        for name in op.returns:
            is_gradient = of(name) != name
            is_there = not is_gradient or of(name) in tensors
            results.append(placed(name, summed if is_gradient else Replicate()) if is_there else Replicate())
        arguments = [placed(name, Replicate()) if name in tensors else None for name in names]
        strategies.append((results, [*arguments, None]))
    return strategies


def _is_even(
    sharding: Sharding, shardings: Sequence[Sharding], tensors: Mapping[str, Any], of: Callable[[str], str]
) -> bool:
    """Return whether all devices get parts of one size: heads and the groups that they share are split in step.

    Over how many devices torch splits a tensor this way is not known here. Those count on whose mesh axis a tensor is
    laid out in a way that no other sharding explains.
    """
    from torch.distributed.tensor import Shard

    others = [other for other in shardings if other is not sharding]
    axes = [
        size
        for axis, size in enumerate(next(iter(tensors.values())).mesh.shape)
        if any(
            not tensor.placements[axis].is_replicate()
            and not any(tensor.placements[axis] == Shard(other[of(name)]) for other in others if of(name) in other)
            for name, tensor in tensors.items()
        )
    ]
    sizes = [tensor.shape[sharding[of(name)]] for name, tensor in tensors.items() if of(name) in sharding]
    return bool(axes) and all(size % math.prod(axes) == 0 for size in sizes)
