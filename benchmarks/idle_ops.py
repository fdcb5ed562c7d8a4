"""Times one call through the front and the op's body, without a kernel."""

import inspect
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from mamba_ops import use_backend
from mamba_ops.registry import Backend, Op


def us_per_call(calls: Mapping[str, Callable[[], object]], *, rounds: int = 200, number: int = 100) -> dict[str, float]:
    """Time calls side by side: the lower quartile, in microseconds, of rounds in which each has its turn.

    Turns are short, so that most of them are over before another process gets in the way.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(1e6 * timeit.timeit(call, number=number) / number)
    return {name: sorted(turns)[rounds // 4] for name, turns in times.items()}


def does_nothing(parameters: Iterable[inspect.Parameter]) -> Callable[..., None]:
    """Return a function that has these parameters and does nothing; taking `*args, **kwargs` would cost more."""
    signature = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
    function: Callable[..., None] = eval(f"lambda {str(signature)[1:-1]}: None")
    return function


@contextmanager
def idle_backend(*ops: Op[...]) -> Iterator[None]:
    """Within the block, these ops run on kernels that do nothing."""
    idle = Backend("idle", devices=None, priority=-100)
    try:
        for op in ops:
            idle.implements(op)(does_nothing(op.parameters))
        with use_backend(idle.name):
            yield
    finally:
        idle.remove()


@contextmanager
def bare_op(op: Op[...]) -> Iterator[Callable[..., None]]:
    """Within the block, there is a plain torch.library op of the same schema that does nothing."""
    selection = inspect.Parameter("selection", inspect.Parameter.KEYWORD_ONLY, default=None)
    library = torch.library.Library("mamba_ops_bare", "FRAGMENT")
    try:
        library.define(op.name + op.schema)
        library.impl(op.name, does_nothing([*op.parameters, selection]), "CompositeExplicitAutograd")
        yield getattr(torch.ops.mamba_ops_bare, op.name).default
    finally:
        library._destroy()
