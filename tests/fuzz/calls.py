"""Draws a random call, makes it, and says how it ended."""

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch

from tests.fuzz import plans
from tests.fuzz.mutations import Pick, mutate, names_of
from tests.fuzz.outcomes import Wrong, outcome
from tests.fuzz.targets import Target, targets

_targets = functools.cache(targets)


def one_call(pick: Pick, backend: str = "torch") -> tuple[str, str]:
    """Make one random call; return what was called and how it ended, or raise Wrong."""
    found = _targets(backend)
    number = pick(len(found) + (4 if backend == "torch" else 0))
    if number >= len(found):
        kind: Callable[[Pick], str] = (plans.plan, plans.plan, plans.plan, plans.pool)[number - len(found)]
        return "Plan" if kind is plans.plan else "StatePool", kind(pick)
    return found[number].name, _call(found[number], pick)


def _call(target: Target, pick: Pick) -> str:
    arguments = target.bases[pick(len(target.bases))]()
    if "out" in arguments and arguments["out"] is None and pick(3):
        del arguments["out"]
    done, numbers = [], {n: type(a) for n, a in arguments.items()}
    for _ in range(pick(3)):
        names = names_of(arguments)
        name = names[pick(len(names))]
        try:
            what = mutate(arguments, name, pick)
        except Exception:
            continue
        if what is not None:
            done.append(what)
    is_recording = not pick(10)
    try:
        with nullcontext() if is_recording else torch.no_grad():
            return outcome(target, arguments, numbers)
    except Exception as wrong:
        shown = {n: tuple(a.shape) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        how = f"{'; '.join(done) or 'unchanged'}{'; in grad mode' if is_recording else ''}"
        raise Wrong(f"{target.name} ({how}): {wrong}\n  {shown}") from wrong
