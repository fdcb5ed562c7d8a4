"""What stands around an op's kernel where a call asks for more than the kernel: checks of values, default arguments."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mamba_ops.registry import errors, memory

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op


def checking(op: "Op[...]", kernel: Callable[..., None]) -> Callable[..., None]:
    """Return a function that checks each call's values, and where its tensors lie, before it runs the kernel.

    What an op returns is new memory, so only ops that write to the caller's have something to look for.
    """
    positional = [p.name for p in op.parameters if p.kind is not p.KEYWORD_ONLY]
    checks = op.facets.get("validate_values")
    writes_to_callers = bool(op.mutates - set(op.returns))

    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if writes_to_callers and not memory.are_apart(
                a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)
            ):
                op.check_memory(dict(zip(positional, args, strict=True)) | kwargs)
            if checks is not None:
                checks(*args, **kwargs)
        except ValueError as error:
            raise errors.in_call_of(op.qualname, error) from None
        kernel(*args, **kwargs)

    run.__wrapped__ = kernel  # type: ignore[attr-defined]
    return run


def filling(op: "Op[...]", kernel: Callable[..., None], first: dict[str, Any]) -> Callable[..., None]:
    """Return a function that runs the kernel with what the settings give, asked for in every call.

    `first` was given for the call that is decided on, and is that call's: what a graph captures is drawn once.
    """
    fills, ready = op.facets["default_arguments"], iter([first])

    def run(*args: Any, **kwargs: Any) -> None:
        kernel(*args, **kwargs | (next(ready, None) or fills(*args, **kwargs)))

    return run


def run_negated(op: "Op[...]", *args: Any, **kwargs: Any) -> Any:
    """Run a call that has views which negate their memory: kernels read memory as it is, so they get copies."""
    names = [p.name for p in op.parameters]
    for name, tensor in (*zip(names, args, strict=False), *kwargs.items()):
        if name in op.mutates and isinstance(tensor, Tensor) and tensor.is_neg():
            raise errors.in_call_of(op.qualname, memory.negated(errors.shown(name)))
    plain = [a.resolve_neg() if isinstance(a, Tensor) else a for a in args]
    return op.overload(*plain, **{n: a.resolve_neg() if isinstance(a, Tensor) else a for n, a in kwargs.items()})
