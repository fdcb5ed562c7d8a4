"""RMS norms of a model of Transformers: one call of `rms_norm` each where that has a kernel, else their own code.

Which classes are such norms, and of which form, is seen from what they compute. A norm is tried on a few numbers on the
CPU, as a twin with the module's settings and weights of its own, and what it gives is compared with the forms of the
op. What gives anything else keeps its code. A form holds for modules of the very class, size and settings that were
tried, so that a class derived from a norm, or a module that somebody changed, is not taken for it.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_ops.ops._common.norms import normalised
from mamba_ops.ops.rms_norm.op import is_one_pass, rms_norm
from mamba_ops.registry import pays

_EPS = 0.3  # of twins: large, so that it shows where it is added
_SIZES = (20, 28)  # of twins that have no weight
_LEADS = {2: ((6,), (1,)), 3: ((2, 3), (2, 1), (1, 3)), 4: ((1, 2, 3), (2, 3, 1))}  # by rank; a single token, too
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_INTERNAL = frozenset((*vars(nn.Module()), "forward"))
_ONE_PLUS = "it multiplies by 1 + weight, which is no argument of rms_norm"
_OTHER = "it computes something else than rms_norm does"
_OWN_FORWARD = "its modules have a forward of their own"


class Form(NamedTuple):
    """What a norm computes, as the op's arguments.

    Attributes:
        weight: where the weight is, "_parameters" or "_buffers"; None: it has none, or does not use it.
        gate: whether a call has one: "never", "always" or "maybe".
        dtype: that of the output: "x", "promoted" with the weight's, or "alike": all must be of one dtype.
        ranks: how many axes hidden states may have.
    """

    weight: str | None
    gate: str
    groups: int
    eps: float
    norm_before_gate: bool
    sigmoid_gate: bool
    dtype: str
    ranks: tuple[int, ...]

    def takes(self, gate: bool) -> bool:
        """Whether it is a norm with a gate, or without one."""
        return self.gate != ("never" if gate else "always")

    def run(self, norm: nn.Module, x: Any, gate: Any) -> Tensor | None:
        """Return what the norm gives, or None where it is to run its own code."""
        if not self.takes(gate is not None):
            return None
        told = vars(norm)
        weight = None if self.weight is None else told[self.weight]["weight"]
        if not is_one_pass(x, weight, gate, groups=self.groups) or x.dim() not in self.ranks:
            return None
        dtype = x.dtype
        if self.dtype == "alike" and not all(t is None or t.dtype == dtype for t in (weight, gate)):
            return None
        if self.dtype == "promoted" and weight is not None and weight.dtype != dtype:
            dtype = torch.promote_types(dtype, weight.dtype)
        return rms_norm(
            x,
            weight,
            gate=gate,
            groups=self.groups,
            eps=self.eps,
            norm_before_gate=self.norm_before_gate,
            sigmoid_gate=self.sigmoid_gate,
            out=_like(x, dtype),
        )


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that is laid out as a norm's own output is: the strides of a single row are not those of `x`."""
    return x.new_empty(x.shape, dtype=dtype) if x.is_contiguous() else torch.empty_like(x, dtype=dtype)


class _Kind:
    """A class of norms.

    Attributes:
        settings: the attributes that modules of it have.
        forms: what modules compute, by size and by the values of these; a reason: nothing that the op does.
    """

    def __init__(self, settings: tuple[str, ...]) -> None:
        self.settings = settings
        self.forms: dict[tuple[Any, ...], Form | str] = {}

    def form(self, norm: nn.Module) -> Form | None:
        """Return what a module computes, if that is known."""
        try:
            form = self.forms.get(self.key(norm))
        except TypeError:  # somebody has changed a setting to what has no hash
            return None
        return form if isinstance(form, Form) else None

    def key(self, norm: nn.Module) -> tuple[Any, ...]:
        told = vars(norm)
        weight = told["_parameters"].get("weight")
        weight = told["_buffers"].get("weight") if weight is None else weight
        return (None if weight is None else weight.shape[0], *[told.get(name) for name in self.settings])


class _Held:
    """A class whose `forward` was replaced, and the bindings that hold it so."""

    def __init__(self, owner: type[nn.Module]) -> None:
        self.owner, self.forward = owner, owner.forward
        self.kinds: dict[type[nn.Module], _Kind] = {}
        self.holders: list[object] = []
        self.replacement = _in_one_pass(self.forward, self.kinds)
        owner.forward = self.replacement

    def put_back(self) -> None:
        self.kinds.clear()  # also for what has kept the replacement
        if vars(self.owner).get("forward") is self.replacement:
            self.owner.forward = self.forward


_held: dict[type[nn.Module], _Held] = {}  # by the class that has the forward


def bind_norms(model: nn.Module, holder: object) -> tuple[dict[str, int], dict[str, str]]:
    """Let the RMS norms of a model be one call of the op, until `unbind_norms`.

    Returns:
        How many modules of each class are, and why those of others are not.
    """
    bound: dict[str, int] = {}
    others: dict[str, str] = {}
    for kind, norms in _candidates(model).items():
        owner = _owner_of(kind)
        name = f"{owner.__module__}.{owner.__qualname__}"
        held = _held.get(owner)
        known = None if held is None else held.kinds.get(kind)
        tried = _Kind(_settings_of(norms, known))
        if known is not None and known.settings == tried.settings:
            tried.forms.update(known.forms)
        forward = owner.forward if held is None else held.forward
        for norm in norms:
            if not all(isinstance(vars(norm).get(setting), _PLAIN) for setting in tried.settings):
                others[name] = _OTHER  # it may look at what nobody sees
                continue
            if (key := tried.key(norm)) not in tried.forms:
                tried.forms[key] = form_of(norm, forward)
            form = tried.forms[key]
            reason = form if isinstance(form, str) else _OWN_FORWARD if "forward" in vars(norm) else ""
            if not reason:
                bound[name] = bound.get(name, 0) + 1
            elif key[0] is not None:  # what has no weight and is no norm is anything
                others[name] = reason
        if name in bound:
            held = _held.setdefault(owner, held or _Held(owner))
            held.kinds[kind] = tried
            if holder not in held.holders:
                held.holders.append(holder)
    return bound, others


def bound_form(norm: nn.Module) -> Form | None:
    """Return what a norm computes if it is bound now."""
    for held in _held.values():
        if (kind := held.kinds.get(type(norm))) is not None and "forward" not in vars(norm):
            return kind.form(norm)
    return None


def unbind_norms(holder: object) -> None:
    """Put the originals back of each class that nothing else holds."""
    for owner, held in list(_held.items()):
        if holder in held.holders:
            held.holders.remove(holder)
            if not held.holders:
                held.put_back()
                del _held[owner]


def _in_one_pass(forward: Callable[..., Any], kinds: dict[type[nn.Module], _Kind]) -> Callable[..., Any]:
    """Return a norm's `forward` that is one call of the op where it can be."""
    names = list(inspect.signature(forward).parameters)[1:]
    first, gate = names if len(names) == 2 else (names[0], "")

    @functools.wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        x = args[0] if args else kwargs.get(first)
        if pays(rms_norm, x) and (kind := kinds.get(type(self))) is not None:  # without a kernel that is all
            form = kind.form(self)
            is_known = len(args) <= 2 and (not kwargs or kwargs.keys() <= set(names[len(args) :]))
            if form is not None and is_known:
                out = form.run(self, x, args[1] if len(args) == 2 else kwargs.get(gate))
                if out is not None:
                    return out
        return forward(self, *args, **kwargs)

    return call


def _candidates(model: nn.Module) -> dict[type[nn.Module], list[nn.Module]]:
    """Return modules that may be RMS norms, by class: a weight at most, a small number, and a `forward` of tensors."""
    found: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        owner = _owner_of(type(module))
        told = vars(module)
        tensors = [*told["_parameters"].items(), *told["_buffers"].items()]
        if owner.__module__.partition(".")[0] == "torch" or told["_modules"] or len(tensors) > 1:
            continue
        if any(name != "weight" or tensor is None or tensor.dim() != 1 for name, tensor in tensors):
            continue
        if any(_small_numbers(module)) and _arguments_of(owner.forward) is not None:
            found.setdefault(type(module), []).append(module)
    return found


def _owner_of(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a class has its `forward` of."""
    return next(base for base in kind.__mro__ if issubclass(base, nn.Module) and "forward" in vars(base))


def _arguments_of(forward: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """Return the hidden states and perhaps a gate, if a `forward` takes these."""
    try:
        _, *arguments = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):  # it is no function, or one without arguments
        return None
    fits = 1 <= len(arguments) <= 2 and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in arguments)
    return arguments if fits and arguments[0].default is inspect.Parameter.empty else None


def _small_numbers(module: nn.Module) -> Iterator[str]:
    return (name for name, value in vars(module).items() if type(value) is float and 0 < value < 0.1)


def _settings_of(norms: list[nn.Module], known: _Kind | None) -> tuple[str, ...]:
    """Return the attributes of modules that were there when they were made: what is private is a note on them."""
    names = {name for norm in norms for name in vars(norm) if not name.startswith("_")} - _INTERNAL
    return tuple(sorted(names.union(() if known is None else known.settings)))


def form_of(norm: nn.Module, forward: Callable[..., Any]) -> Form | str:
    """Try a norm, by a `forward` of its class; return what it computes, or why it is nothing that the op does."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what a norm says of dtypes that are tried is nothing to the user
        for eps in _small_numbers(norm):
            if (form := _Trial(norm, forward, eps).form()) != _OTHER:
                return form
    return _OTHER


class _Trial:
    """A norm tried with twins of it, on numbers on the CPU."""

    def __init__(self, norm: nn.Module, forward: Callable[..., Any], eps: str) -> None:
        self.norm, self.forward, self.eps = norm, forward, eps
        told = vars(norm)
        self.place = next((place for place in ("_parameters", "_buffers") if told[place]), None)
        arguments = _arguments_of(forward)
        assert arguments is not None
        self.takes_gate = len(arguments) == 2
        self.has_default = self.takes_gate and arguments[1].default is None
        sizes = _SIZES if self.place is None else told[self.place]["weight"].shape
        self.numbers = [_numbers(size) for size in sizes]

    def form(self) -> Form | str:
        """Return what the norm computes."""
        for first, sigmoid in product((False, True), (False, True)) if self.takes_gate else [(False, False)]:
            for groups in self._groups():
                options = {"groups": groups, "norm_before_gate": first, "sigmoid_gate": sigmoid}
                for place in dict.fromkeys((self.place, None) if groups == 1 else (self.place,)):
                    if self._fits(place, options):
                        return self._form(place, options)
                if self._fits(self.place, options, one_plus=True):
                    return _ONE_PLUS
        return _OTHER

    def _form(self, place: str | None, options: dict[str, Any]) -> Form | str:
        if (dtype := self._dtype(place)) is None:
            return _OTHER
        gate = "always" if self.takes_gate else "never"
        if self.has_default and self._fits(place, options, gated=False):
            gate = "maybe"
        ranks = tuple(rank for rank in (2, 3, 4) if self._fits(place, options, rank=rank))
        return Form(weight=place, gate=gate, eps=vars(self.norm)[self.eps], dtype=dtype, ranks=ranks, **options)

    def _groups(self) -> list[int]:
        """Return how many groups there may be: one, or as a setting says, which is their size or their number."""
        if self.place is None:  # sizes are not known
            return [1]
        size = self.numbers[0][0].shape[-1]
        said = [value for value in vars(self.norm).values() if type(value) is int and value > 0 and size % value == 0]
        return list(dict.fromkeys((1, *(size // value for value in said), *said)))

    def _fits(
        self, place: str | None, options: dict[str, Any], *, one_plus: bool = False, gated: bool = True, rank: int = 3
    ) -> bool:
        """Return whether twins compute this, in training too."""
        for (rows, weight, gates), lead in product(self.numbers, _LEADS[rank]):
            x, gate = (t[: math.prod(lead)].view(*lead, -1) for t in (rows, gates))
            used = None if place is None else weight + 1 if one_plus else weight
            calls = [(x, gate)] if gated and self.takes_gate else [(x,), (x, None)] if self.takes_gate else [(x,)]
            act = calls[0][1] if len(calls[0]) == 2 else None
            expected = normalised(x, used, gate=act, eps=_EPS, **options)[0]
            for given, training in product(calls, (False, True)):
                found = self._give(weight, *given, training=training)
                if found is None or found.dtype != x.dtype or found.shape != x.shape:
                    return False
                if not torch.allclose(found, expected, rtol=2e-5, atol=1e-5):
                    return False
        return True

    def _dtype(self, place: str | None) -> str | None:
        """Return of which dtype the output is, as `Form` says it; None: of another one."""
        x, weight, gate = self.numbers[0]
        narrow, wide = torch.bfloat16, torch.float32
        found: dict[tuple[torch.dtype, ...], torch.dtype | None] = {}
        for dtypes in product((narrow, wide), repeat=3):
            of_x, of_weight, of_gate = dtypes
            given = (x.to(of_x)[None], gate.to(of_gate)[None]) if self.takes_gate else (x.to(of_x)[None],)
            out = self._give(weight.to(of_weight), *given)
            found[dtypes] = None if out is None else out.dtype
        if all(dtype == of_x for (of_x, _, _), dtype in found.items()):
            return "x"
        if place and all(dtype == torch.promote_types(*dtypes[:2]) for dtypes, dtype in found.items()):
            return "promoted"
        return "alike" if found[narrow, narrow, narrow] == narrow else None

    def _give(self, weight: Tensor, *given: Tensor | None, training: bool = False) -> Tensor | None:
        """Return what a twin with this weight gives; None: no tensor."""
        twin = object.__new__(type(self.norm))
        twin.__dict__ |= vars(self.norm) | {self.eps: _EPS, "training": training}
        if self.place is not None:
            twin.__dict__[self.place] = {"weight": weight}
        try:
            found = self.forward(twin, *given)
        except Exception:  # something else than a norm may raise whatever it likes
            return None
        return found if isinstance(found, Tensor) else None


def _numbers(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of hidden states, small ones and large ones, a weight and gates."""
    generator = torch.Generator("cpu").manual_seed(size)
    new: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    scale = torch.tensor([0.1, 50.0, 1.0, 1.0, 0.1, 50.0], device="cpu", dtype=torch.float32)[:, None]
    return torch.randn((6, size), **new) * scale, torch.randn(size, **new), torch.randn((6, size), **new)
