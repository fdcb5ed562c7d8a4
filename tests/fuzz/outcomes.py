"""How a call ended, and whether it may: right against float64, or with a clear error and all tensors as they were."""

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from mamba_ops import registry
from mamba_ops.registry import NoBackendError, RegistryError
from mamba_ops.testing.judge import assert_within_budget
from tests.fuzz.mutations import Arguments
from tests.fuzz.targets import Results, Target

RIGHT, REFUSED, NO_TRUTH = "right", "refused in a sentence", "outside the contract"
"""How calls may end; the last is a call that is taken and that nobody says anything about, see `has_no_truth`."""


class Wrong(AssertionError):
    """A call ended as none may."""


Storages = dict[int, tuple[Tensor, Tensor]]
_truths: dict[tuple[str, bytes, torch.dtype], Results] = {}


def outcome(target: Target, arguments: Arguments, types: Mapping[str, type]) -> str:
    """Make a call; return how it ended, or raise Wrong.

    Args:
        target, arguments: what is called, and with what.
        types: of the arguments of a right call: numbers equal to one that was seen, as 2.0 for 2, may be taken.
    """
    before = {n: _value(a) for n, a in arguments.items()}
    before |= {n: int(a) for n, a in before.items() if isinstance(a, float) and types[n] is int and a.is_integer()}
    before |= {n: float(a) for n, a in before.items() if type(a) is int and types[n] is float}
    storages = _storages(arguments)
    outside = has_no_truth(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            returned = target.call(**arguments)
    except Exception as error:
        changed = _changed(storages)
        if changed:
            raise Wrong(f"it ended in {error!r}, and wrote to {', '.join(_owners(changed, arguments))}") from error
        if (problem := unclear(error, target, arguments)) is not None:
            raise Wrong(f"it ended in {type(error).__name__}: {error}: {problem}") from error
        return REFUSED
    if outside:
        return NO_TRUTH
    _assert_right(target, before, arguments, returned)
    written = [a for n in target.written if isinstance(a := arguments.get(n), Tensor)]
    owners = {_address(t) for t in written}
    if changed := _changed({place: s for place, s in storages.items() if place not in owners}):
        raise Wrong(f"it wrote to {', '.join(_owners(changed, arguments))}")
    return RIGHT


def unclear(error: Exception, target: Target, arguments: Arguments) -> str | None:
    """Return what a message lacks: a class that callers catch, the name of what was called, and of an argument."""
    text = str(error)
    if not isinstance(error, (ValueError, TypeError)):
        return "expected a ValueError or a TypeError"
    if isinstance(error, NoBackendError):
        return None
    ops = {op.name: [p.name for p in op.parameters] for op in registry.ops().values()}
    called = [target.name, *((*ops, *target.inside) if target.inside else ())]
    if not any(f"{name}: " in text or f"{name}() " in text for name in called):
        return f"it does not say that {target.name} was called"
    names = {*arguments, "out"} | {p for name in called for p in ops.get(name, ())}
    if not any(f"{name}: " in text or f"{name}, " in text or f"'{name}'" in text for name in names):
        return "it names no argument"
    if not isinstance(error, RegistryError) and not ("got" in text and "expected" in text):
        return "it does not say what it got and expected"
    return None


def has_no_truth(arguments: Arguments) -> bool:
    """Whether a contract says that the caller must not make this call, and that it is not noticed.

    Two rows have one slot, or one stores to a slot of another's: which of them comes first is open. All tensors are
    fake, on meta or under a mode: nothing is computed. A tensor of a class without rules counts as what it is.
    """
    tensors = [a for a in arguments.values() if isinstance(a, Tensor)]
    if any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
        return True
    if _crosses(arguments.get("slots"), arguments.get("write_slots")):
        return True
    for name, other in arguments.items():
        is_table = "slots" in name or "indices" in name
        table = other if is_table else getattr(getattr(other, "tensors", None), "slots", None)
        if isinstance(table, Tensor) and _has_twice(table):
            return True
    return False


def _crosses(slots: Any, write_slots: Any) -> bool:
    """Whether a row stores to a slot of another row."""
    tables = [t for t in (slots, write_slots) if isinstance(t, Tensor) and t.dtype in (torch.int32, torch.int64)]
    if len(tables) < 2 or any(t.layout is not torch.strided or t.is_nested or not t.dim() for t in tables):
        return False
    read, stored = ([{*row.flatten().tolist()} for row in table] for table in tables)
    return any(i != j and s & r - {-1} for i, s in enumerate(stored) for j, r in enumerate(read))


def _has_twice(table: Tensor) -> bool:
    if table.layout is not torch.strided or table.is_nested or table.dtype not in (torch.int32, torch.int64):
        return False
    taken = table.flatten()[table.flatten() >= 0]
    return taken.unique().numel() < taken.numel()


# -- numbers ----------------------------------------------------------------------------------------------------------


def _assert_right(target: Target, before: Arguments, arguments: Arguments, returned: Any) -> None:
    truth, low = (_truth(target, before, dtype) for dtype in (torch.float64, torch.float32))
    results = target.results(returned, arguments)
    for name, actual in results.items():
        if truth.get(name) is None or not actual.is_floating_point():
            continue
        exact, rounded = truth[name].double(), low[name].double()
        if actual.shape != exact.shape:
            raise Wrong(f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
        known = exact.isfinite() & rounded.isfinite()  # no claim about what float32 cannot hold
        actual, exact, rounded = (t.detach().double().where(known, 0) for t in (actual, exact, rounded))
        stored = results[name].dtype
        if not target.has_oracle and _is_of_16_bits(before):
            most = 16 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max()) if exact.numel() else 0.0
            if not bool(((actual - exact).abs() <= most + 1e-3).all()):
                raise Wrong(f"{name} is off by {float((actual - exact).abs().max()):.3g}, expected at most {most:.3g}")
            continue
        try:
            assert_within_budget(actual.to(stored), exact, rounded, name)
        except AssertionError as error:
            raise Wrong(str(error)) from None


def _is_of_16_bits(arguments: Arguments) -> bool:
    return any(isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16) for a in arguments.values())


def _truth(target: Target, before: Arguments, dtype: torch.dtype) -> Results:
    key = (target.name, _fingerprint(before), dtype)
    if key not in _truths:
        if len(_truths) > 4000:
            _truths.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _truths[key] = target.truth(before, dtype)
    return _truths[key]


def _fingerprint(arguments: Arguments) -> bytes:
    found = hashlib.sha1(usedforsecurity=False)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
            dense = value.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
            facts = dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
            found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode() + facts)
        else:
            plan = getattr(value, "tensors", None)
            found.update(f"{name}{value if plan is None else [t if t is None else t.tolist() for t in plan]}".encode())
    return found.digest()


# -- memory -----------------------------------------------------------------------------------------------------------


def _value(value: Any) -> Any:
    """Return a copy of what a tensor means, dense."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_meta or value.is_nested:
        return value
    if value.layout is not torch.strided or value.is_quantized:
        return value
    with torch.no_grad():
        return value.detach().as_subclass(Tensor).resolve_neg().clone()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _storages(arguments: Arguments) -> Storages:
    """Return each block of memory that the arguments are in, as bytes, with a copy."""
    found: Storages = {}
    for value in arguments.values():
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.is_nested or value.is_quantized:
            continue
        if value.layout is not torch.strided or value.is_meta or not (place := _address(value)):
            continue
        memory = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
        found[place] = memory, memory.clone()
    return found


def _changed(storages: Storages) -> list[int]:
    return [place for place, (now, was) in storages.items() if not torch.equal(now, was)]


def _owners(places: list[int], arguments: Arguments) -> list[str]:
    return [n for n, a in arguments.items() if isinstance(a, Tensor) and _address(a) in places]
