"""How a call ended, and whether it may: right against float64, or with a clear error and all tensors as they were."""

import hashlib
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_ops import registry
from mamba_ops.registry import NoBackendError, RegistryError
from mamba_ops.testing.judge import assert_within_budget
from tests.fuzz import memory
from tests.fuzz.mutations import Arguments, plain
from tests.fuzz.targets import Judge, Results, Target

RIGHT, REFUSED, NO_TRUTH = "right", "refused in a sentence", "outside the contract"
"""How calls may end; the last is a call that is taken and that nobody says anything about, see `has_no_truth`."""


class Wrong(AssertionError):
    """A call ended as none may."""


_truths: dict[tuple[Any, bytes, torch.dtype], Results] = {}


def outcome(
    target: Target,
    arguments: Arguments,
    types: Mapping[str, type],
    *,
    is_right: bool = False,
    had_no_numbers: frozenset[str] = frozenset(),
) -> str:
    """Make a call; return how it ended, or raise Wrong.

    Args:
        target, arguments: what is called, and with what.
        types: of the arguments of a right call: numbers equal to one that was seen, as 2.0 for 2, may be taken.
        is_right: whether it is a right call, which may not be refused.
        had_no_numbers: `no_numbers` of the right call that this one was: there they are where nobody reads.
    """
    before = {n: memory.value(a) for n, a in arguments.items()}
    before |= {n: int(a) for n, a in before.items() if isinstance(a, float) and types[n] is int and a.is_integer()}
    before |= {n: _as_float(n, a) for n, a in before.items() if types[n] is float and _is_number(a)}
    storages = memory.storages(arguments)
    outside, modes = has_no_truth(arguments), _modes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            returned = target.call(**arguments)
        _assert_modes(modes)
    except Exception as error:
        _assert_modes(modes)
        changed = memory.changed(storages)
        if changed:
            raise Wrong(
                f"it ended in {error!r}, and wrote to {', '.join(memory.owners(changed, arguments))}"
            ) from error
        if (problem := unclear(error, target, arguments)) is not None:
            raise Wrong(f"it ended in {type(error).__name__}: {error}: {problem}") from error
        if is_right:
            raise Wrong(f"a right call ended in {type(error).__name__}: {error}") from error
        return REFUSED
    is_chunked = target.returns_gradients or target.name not in TOKEN_BY_TOKEN
    is_spoiled = is_chunked and bool(no_numbers(before) - had_no_numbers)
    if outside or (not is_right and (is_spoiled or grows(before))):
        return NO_TRUTH
    try:
        _assert_right(target, before, arguments, returned)
    except Wrong:
        if is_right or not overflows(target, before):
            raise
        return NO_TRUTH
    written = [a for n in target.written if isinstance(a := arguments.get(n), Tensor)]
    owners = {memory.address(t) for t in written}
    if changed := memory.changed({place: s for place, s in storages.items() if place not in owners}):
        raise Wrong(f"it wrote to {', '.join(memory.owners(changed, arguments))}")
    return RIGHT


def _modes() -> tuple[bool, bool]:
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


def _assert_modes(before: tuple[bool, bool]) -> None:
    if (now := _modes()) != before:
        torch.set_grad_enabled(before[1])
        raise Wrong(f"it left inference and grad mode {now}, they were {before}")


def unclear(error: Exception, target: Target, arguments: Arguments) -> str | None:
    """Return what a message lacks: a class that callers catch, the name of what was called, and of an argument."""
    text = str(error)
    if isinstance(error, NotImplementedError) and "under forward-mode differentiation" in text:
        return None  # as torch's own ops without a formula end
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


TOKEN_BY_TOKEN = frozenset(
    [
        *("causal_conv1d", "causal_conv1d_fn", "causal_conv1d_update", "gated_delta_rule_update", "Mamba"),
        *("mamba_mixing", "selective_scan", "selective_scan_fn", "selective_state_update"),
    ]
)
"""What computes no products over several tokens."""


def no_numbers(arguments: Arguments) -> frozenset[str]:
    """Names of the tensors with a floating-point number that is none, or infinite: what is a product over tokens has
    that in all of them.

    An endless decay is the exception.
    """
    found = set()
    for name, tensor in _floats(arguments).items():
        wrong = ~tensor.isfinite()
        if bool((wrong & (tensor != -torch.inf) if name in ("A", "g") else wrong).any()):
            found.add(name)
    return frozenset(found)


def _floats(arguments: Arguments) -> Arguments:
    """Return the ordinary floating-point tensors of a call, in float64."""
    found = {n: a for n, a in arguments.items() if isinstance(a, Tensor) and a.is_floating_point()}
    found = {n: t for n, t in found.items() if t.layout is torch.strided and t.device.type == "cpu" and not t.is_nested}
    return {n: t.detach().double() for n, t in found.items() if not isinstance(t, FakeTensor)}


def grows(arguments: Arguments) -> bool:
    """Whether states may grow by e^20 within a call, or turn so far: float32 holds no such products, or their turns."""
    floats = {n: t for n, t in _floats(arguments).items() if t.numel()}
    if "angles" in floats and "dt" in floats and floats["dt"].abs().max() > 2**20:
        return True
    if (beta := floats.get("beta")) is not None and (k := floats.get("k")) is not None and k.dim():
        is_normal = arguments.get("qk_l2norm") or arguments.get("use_qk_l2norm_in_kernel")
        strength = float(beta.abs().max() * (1 if is_normal else k.norm(dim=-1).max() ** 2))
        if math.log(max(strength - 1, 1)) * k.shape[:-2].numel() > 20:  # a write may be as much as it overwrites
            return True
    logs = floats.get("g")
    dt, A = floats.get("dt", floats.get("delta")), floats.get("A")
    if dt is not None and A is not None:
        bias = floats.get("dt_bias", floats.get("delta_bias", torch.zeros(1)))
        steps = torch.stack([dt.min() + bias.min(), dt.max() + bias.max()])
        if arguments.get("dt_softplus") or arguments.get("delta_softplus"):
            steps = torch.nn.functional.softplus(steps)
        low, high = (arguments.get(n) for n in ("dt_min", "dt_max"))
        low, high = (float(v) if _is_number(v) else None for v in (low, high))
        steps = steps if low is high is None else steps.clamp(low, high)
        logs = torch.outer(steps, torch.stack([A.min(), A.max()]))
        tokens = dt.numel() // dt.shape[-1] if dt.dim() else 1
    elif logs is not None:
        tokens = logs.numel() // logs.shape[-1] if logs.dim() else 1
    else:
        return False
    return bool(logs.max() * tokens > 20)


def overflows(target: Target, arguments: Arguments) -> bool:
    """Whether a number on the way to the truth is nearly more than float32 holds, or more.

    Kernels multiply in other orders than oracles do. One that gets to such a number where the other does not has an
    infinity there, and a NaN of it even where the truth is zero.
    """
    largest = _Largest()
    with warnings.catch_warnings(), largest:
        warnings.simplefilter("ignore")
        target.truth(arguments, torch.float64)
    return largest.found > LARGEST**2


class _Largest(TorchDispatchMode):
    """Finds the largest finite number that is computed, but for exponentials: what they overflow to is discarded."""

    found = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        for tensor in tree_leaves(result) if "empty" not in name and not name.startswith("exp") else ():
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                self.found = max(self.found, float(tensor.detach().nan_to_num(0, 0, 0).abs().max()))
        return result


def _crosses(slots: Any, write_slots: Any) -> bool:
    """Whether a row stores to a slot of another row."""
    tables = [plain(t) for t in (slots, write_slots)]
    tables = [t for t in tables if isinstance(t, Tensor) and t.dtype in (torch.int32, torch.int64)]
    if len(tables) < 2 or any(t.layout is not torch.strided or t.is_nested or not t.dim() for t in tables):
        return False
    read, stored = ([{*row.flatten().tolist()} for row in table] for table in tables)
    return any(i != j and s & r - {-1} for i, s in enumerate(stored) for j, r in enumerate(read))


def _has_twice(table: Tensor) -> bool:
    table = plain(table)
    if table.layout is not torch.strided or table.is_nested or table.dtype not in (torch.int32, torch.int64):
        return False
    taken = table.flatten()[table.flatten() >= 0]
    return taken.unique().numel() < taken.numel()


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.size == 1
    if isinstance(value, Tensor):
        return value.numel() == 1 and not isinstance(value, FakeTensor) and not value.is_meta
    return hasattr(value, "__float__") and not isinstance(value, bool)


def _as_float(name: str, value: Any) -> float:
    """Return a number as kernels get it: a limit of step sizes is the largest float32 at most."""
    most = torch.finfo(torch.float32).max
    is_limit = name.startswith("dt_") and not math.isnan(value)
    return min(max(float(value), -most), most) if is_limit else float(value)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _assert_right(target: Target, before: Arguments, arguments: Arguments, returned: Any) -> None:
    truth, low = (_truth(target, before, dtype) for dtype in (torch.float64, torch.float32))
    results = {n: plain(t) for n, t in target.results(returned, arguments).items() if t.is_floating_point()}
    results = {n: t for n, t in results.items() if truth.get(n) is not None and truth[n].is_floating_point()}
    steps = {n: m[1] for n, m in target.meant(arguments).items() if m is not None}
    if not results:
        raise Wrong("it returned nothing of which the truth is known")
    if (judge := target.judge) is not None and (target.has_oracle or not _is_of_16_bits(before)):
        _assert_together(judge, results, truth, low, steps)
        return
    for name, actual in results.items():
        exact, rounded, stored = truth[name].double(), low[name].double(), actual.dtype
        if actual.shape != exact.shape:
            raise Wrong(f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
        known, step = _is_known(exact, rounded, stored, steps.get(name))
        rounded = rounded.where(known, _error(exact, rounded))
        if name == "angle_state":  # turns are summed as whole numbers, in steps of 2^-40
            rounded = rounded + math.pi * 2**-40
        actual, exact = (t.detach().double().where(known, 0) for t in (actual, exact))
        if not target.has_oracle and _is_of_16_bits(before):
            most = 16 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max()) if exact.numel() else 0.0
            if not bool(((actual - exact).abs() <= most + 1e-3).all()):
                raise Wrong(f"{name} is off by {float((actual - exact).abs().max()):.3g}, expected at most {most:.3g}")
            continue
        try:
            assert_within_budget(actual.to(stored), exact, rounded, name, step=step)
        except AssertionError as error:
            raise Wrong(str(error)) from None


LARGEST = 1e18  # its square is less than what float32 holds


def _is_known(exact: Tensor, rounded: Tensor, dtype: torch.dtype, step: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where there is a claim: not about what its dtype holds barely or not, so that steps on the way may overflow.

    And how far apart neighbours are there, of numbers in a row that has one scale, so that it is known as a whole.
    """
    most = min(LARGEST, torch.finfo(dtype).max / 2)
    known = exact.isfinite() & rounded.isfinite() & (exact.abs() < most)
    if step is None:
        return known, None
    known = known.all(-1, keepdim=True).expand_as(known)
    return known, step.where(known, 0)


def _error(exact: Tensor, rounded: Tensor) -> Tensor:
    """The oracle's own error, where float32 holds both.

    It counts in the budget also where nothing is claimed: what is claimed may be a small difference of such numbers.
    """
    return (rounded - exact).where(exact.isfinite() & rounded.isfinite(), 0)


def _assert_together(judge: Judge, results: Results, truth: Results, low: Results, steps: Results) -> None:
    """Leave the comparison to the target, for what float64 and float32 can hold."""
    shapes = [{name: tuple(found[name].shape) for name in results} for found in (results, truth)]
    if shapes[0] != shapes[1]:
        raise Wrong(f"it returned {shapes[0]}, expected {shapes[1]}")
    claims = {n: _is_known(truth[n], low[n], results[n].dtype, steps.get(n)) for n in results}
    known = {n: where for n, (where, _) in claims.items()}
    steps = {n: step for n, (_, step) in claims.items() if step is not None}
    found = {n: t.detach().where(known[n], 0) for n, t in results.items()}
    exact = {n: truth[n].double().where(known[n], 0) for n in results}
    rounded = {
        n: low[n].double().where(known[n], _scaled_error(truth[n].double(), low[n].double(), exact[n])) for n in results
    }
    try:
        judge(found, exact, rounded, steps)
    except AssertionError as error:
        raise Wrong(str(error)) from None


def _scaled_error(exact: Tensor, rounded: Tensor, claimed: Tensor) -> Tensor:
    """The oracle's own error as it would be if the largest number were the largest of which something is claimed."""
    size = exact.where(exact.isfinite() & rounded.isfinite(), 0).abs()
    return _error(exact, rounded) * (claimed.abs().max() / size.max() if size.any() else 0)


def _is_of_16_bits(arguments: Arguments) -> bool:
    return any(isinstance(a, Tensor) and a.dtype in (torch.float16, torch.bfloat16) for a in arguments.values())


def _truth(target: Target, before: Arguments, dtype: torch.dtype) -> Results:
    key = (target.truth, _fingerprint(before), dtype)
    if key not in _truths:
        if len(_truths) > 4000:
            _truths.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = target.truth(before, dtype)  # what is written there in grad mode may require grad
            _truths[key] = {n: t.detach() for n, t in found.items() if t is not None}
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
