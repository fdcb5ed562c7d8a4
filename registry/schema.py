"""From a declared function to the parameters of a schema, refusing what torch accepts and then breaks on."""

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry import codegen, errors

_SCHEMA_TYPES = (Tensor, Tensor | None, int, float, float | None, bool)


def as_in_schema(parameter: inspect.Parameter, is_cache: bool) -> inspect.Parameter:
    """Return a parameter as the schema has it: caches are tensors, and no default is infinite, which none can say."""
    if is_cache:
        return parameter.replace(annotation=Tensor, default=parameter.empty)
    if isinstance(parameter.default, float) and not math.isfinite(parameter.default):
        return parameter.replace(default=parameter.empty)
    return parameter


def infer(
    parameters: list[inspect.Parameter], caches: Collection[str], mutates: frozenset[str], returns: Collection[str]
) -> str:
    """Return the schema of an op: its parameters, then the selection token. What it `returns` is no parameter there;
    then all parameters are positional and without defaults, because autograd knows no other tensors.
    """
    token = inspect.Parameter("selection", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
    found = [as_in_schema(p, p.name in caches) for p in parameters]
    result: Any = None
    if returns:
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        found = [p.replace(kind=positional, default=p.empty) for p in found if p.name not in returns]
        token, mutates = token.replace(kind=positional), frozenset()
        result = tuple[(Tensor,) * len(returns)] if len(returns) > 1 else Tensor  # type: ignore[misc]

    def stub() -> None: ...

    stub.__signature__ = inspect.Signature([*found, token], return_annotation=result)  # type: ignore[attr-defined]
    return torch.library.infer_schema(stub, mutates_args=tuple(mutates))


def parameters_of(op: str, function: Callable[..., Any], mutates: frozenset[str]) -> list[inspect.Parameter]:
    """Read the schema's parameters off a declared function, refusing what torch accepts and then breaks on."""
    parameters: list[inspect.Parameter] = []
    what = f"{op} ({errors.source_of(function)})"
    is_front = "out" in inspect.signature(function).parameters
    for p in inspect.signature(function).parameters.values():
        if isinstance(p.annotation, str):
            raise errors.declaration(what, "annotations are strings; drop `from __future__ import annotations` there")
        if p.name == "selection" or (p.name == "output" and p.default is not p.empty):
            raise errors.declaration(what, f"`{p.name}` is the registry's own; call the output `out`, default None")
        if p.name == "out":
            p = inspect.Parameter("output", p.kind, annotation=Tensor)
        if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            raise errors.declaration(what, f"{p.name}: *args, **kwargs and positional-only do not fit a schema")
        if p.annotation not in _SCHEMA_TYPES:
            allowed = (
                "Tensor, Tensor | None, int, float, float | None or bool (a str would make every layer's graph its own)"
            )
            raise errors.declaration(what, f"{p.name}: got {p.annotation}, expected {allowed}")
        if p.name in mutates and p.annotation is not Tensor and not (is_front and codegen.left_out([p], mutates)):
            remedy = f"where it may be left out, declare the front: `*, {p.name}: Tensor | None = None, ..., out`"
            raise errors.declaration(what, f"{p.name}: a mutated argument is a Tensor, never optional; {remedy}")
        if p.name == "output" and p.kind is not p.KEYWORD_ONLY:
            raise errors.declaration(what, "the output must be keyword-only")
        parameters.append(p)
    names = [p.name for p in parameters]
    if missing := mutates - set(names):
        raise errors.declaration(what, f"mutates {', '.join(sorted(missing))}, which it does not have")
    if not mutates or ("output" in names and "output" not in mutates):
        raise errors.declaration(what, "an op writes into what it is given: name output and caches in `mutates`")
    if Tensor not in [p.annotation for p in parameters]:
        raise errors.declaration(what, "needs at least one Tensor")
    return parameters
