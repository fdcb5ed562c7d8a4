"""Draws a random call, makes it, and says how it ended."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from tests.fuzz import plans, training
from tests.fuzz.mutations import Pick, mutate, names_of
from tests.fuzz.outcomes import Wrong, no_numbers, outcome
from tests.fuzz.targets import Target, targets

SERVING: tuple[tuple[str, Callable[[Pick], str]], ...] = (
    *[("Plan", plans.plan)] * 3,
    ("StatePool", plans.pool),
    ("StatePool.copy", plans.copy),
    ("PrefixCache", plans.prefixes),
)


@functools.cache
def all_targets(backend: str) -> list[Target]:
    """All that there is to call."""
    judge = None if backend == "torch" else training.judge
    found = [t if t.has_oracle else t._replace(judge=judge) for t in targets(backend)]
    return [*found, *training.targets(backend)]


def one_call(pick: Pick, backend: str = "torch") -> tuple[str, str]:
    """Make one random call; return what was called and how it ended, or raise Wrong."""
    found = all_targets(backend)
    number = pick(len(found) + (len(SERVING) if backend == "torch" else 0))
    if number >= len(found):
        name, kind = SERVING[number - len(found)]
        return name, kind(pick)
    return found[number].name, call_of(found[number], pick)


def call_of(target: Target, pick: Pick) -> str:
    """Make one random call of a target; return how it ended, or raise Wrong."""
    arguments = target.bases[pick(len(target.bases))]()
    if "out" in arguments and arguments["out"] is None and pick(3):
        del arguments["out"]
    done, numbers = [], {n: type(a) for n, a in arguments.items()}
    had_no_numbers = no_numbers(arguments)
    for _ in range(pick(3)):
        names = names_of(arguments)
        name = names[pick(len(names))]
        try:
            what = mutate(arguments, name, pick)
        except Exception:
            continue
        if what is not None:
            done.append(what)
    is_recording = target.records or not pick(10)
    if is_recording:
        done += ["in grad mode"] * (not target.records)
    elif not pick(10):
        names = [n for n, a in arguments.items() if _can_be_transformed(a)]
        has_fake = any(isinstance(a, FakeTensor) for a in arguments.values())  # torch's own operators end in assertions
        if names and not target.records and not has_fake:
            name, transform = names[pick(len(names))], [*TRANSFORMS][pick(len(TRANSFORMS))]
            done.append(f"{name} under {transform}")
            target = target._replace(call=functools.partial(TRANSFORMS[transform], target.call, name))
    try:
        with nullcontext() if is_recording else torch.no_grad():
            return outcome(target, arguments, numbers, is_right=not done, had_no_numbers=had_no_numbers)
    except Exception as wrong:
        shown = {n: tuple(a.shape) if isinstance(a, Tensor) else a for n, a in arguments.items()}
        raise Wrong(f"{target.name} ({'; '.join(done) or 'unchanged'}): {wrong}\n  {shown}") from wrong


def _can_be_transformed(value: Any) -> bool:
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.is_nested
    return is_plain and value.is_floating_point() and not value.is_inference() and value.itemsize > 1


# -- transforms -------------------------------------------------------------------------------------------------------


def _tensors(returned: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(t, Tensor))


def _mapped(call: Callable[..., Any], name: str, **arguments: Any) -> Any:
    """Map one argument over a dimension of two equal entries, which have equal results."""
    value = arguments[name]
    found = torch.vmap(lambda entry: _tensors(call(**{**arguments, name: entry})))(torch.stack([value, value]))
    for result in found:
        torch.testing.assert_close(result[0], result[1], equal_nan=True)
    return tuple(result[0] for result in found)


def _dual(call: Callable[..., Any], name: str, **arguments: Any) -> Any:
    """Give one argument a tangent, which goes on to a result, or the call is refused."""
    with forward_ad.dual_level():
        value = arguments[name] if arguments[name].is_contiguous() else arguments[name].clone()
        given = forward_ad.make_dual(value, torch.ones_like(value))
        found = [forward_ad.unpack_dual(t) for t in _tensors(call(**{**arguments, name: given}))]
    if not any(tangent is not None for _, tangent in found) and _has_effect(call, name, arguments):
        raise Wrong("it lost a tangent")
    return tuple(primal for primal, _ in found)


def _has_effect(call: Callable[..., Any], name: str, arguments: dict[str, Any]) -> bool:
    """Whether what a call returns changes with one of its arguments, which functions of other libraries may ignore."""
    value = arguments[name].detach()
    found = []
    for other in (value, 2 * value + 1):
        given = {n: a.clone() if isinstance(a, Tensor) else a for n, a in {**arguments, name: other}.items()}
        try:
            found.append(_tensors(call(**given)))
        except ValueError:  # it is read
            return True
    return any(not torch.equal(one.nan_to_num(), two.nan_to_num()) for one, two in zip(*found, strict=True))


def _differentiated(call: Callable[..., Any], name: str, **arguments: Any) -> Any:
    """Differentiate by one argument."""
    results: tuple[Tensor, ...] = ()

    def total(value: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = _tensors(call(**{**arguments, name: value}))
        return sum((t.sum() for t in found if t.is_floating_point()), torch.zeros(())), found

    with torch.enable_grad():
        gradient, results = torch.func.grad(total, has_aux=True)(arguments[name])
    assert gradient.shape == arguments[name].shape
    return tuple(t.detach() for t in results)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "vmap": _mapped,
    "forward-mode AD": _dual,
    "torch.func.grad": _differentiated,
}
