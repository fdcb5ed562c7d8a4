"""What stands for an op in a program that is to run without it: its reference, traced down to ops of torch.

`decompositions()` is a table as `torch.export.ExportedProgram.run_decompositions` takes it. torch asks such a table for
functional ops alone; here it is asked for ops that mutate, too: `_torch.honour_decompositions`. A reference that is
traced meets symbols in place of sizes: see `mamba_ops.ops._common.chunk_layout`.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mamba_ops.registry import _torch, errors
from mamba_ops.registry.backend import COMPOSED, REFERENCE
from mamba_ops.registry.dispatcher import dispatcher, within

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op

_is_decomposing: ContextVar[bool] = ContextVar("whether a reference is being traced", default=False)
is_decomposing = _is_decomposing.get


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the overload of every op with what it is decomposed to; companions for training are among them."""
    _torch.honour_functional_decompositions([op.overload for op in dispatcher.ops.values() if op.returns])
    return {op.overload: op.decompose for op in dispatcher.ops.values()}


def decompose(op: "Op[...]", *args: Any, **kwargs: Any) -> Any:
    """Run an op's decomposition, by default its reference, on what the overload was called with."""
    given = dict(zip((p.name for p in op._called), args, strict=False)) | kwargs
    given.pop("selection", None)
    for p in op._called:
        given.setdefault(p.name, p.default)
        if p.name in op._left_out and given[p.name] is not None and given[p.name].numel() == 0:
            given[p.name] = None
    results: dict[str, Tensor] = {}
    if op.returns:
        results = dict(zip(op.returns, op.allocate(*(given[p.name] for p in op._called)), strict=True))
    run = op.facets.get("decomposition") or op.kernels[(COMPOSED if op.composed else REFERENCE).name].function
    positional = [given.pop(p.name) for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        with within(_is_decomposing, True), torch.no_grad():
            run(*positional, **given, **results)
    except ValueError as error:
        raise errors.in_call_of(op.qualname, error) from None
    returned = tuple(results.values())
    return returned if len(returned) > 1 else returned[0] if returned else None
