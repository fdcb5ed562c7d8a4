"""What can run ops: a `Backend` is a name, the devices it runs on, what it needs, and its kernels."""

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mamba_ops.registry import adapters, errors
from mamba_ops.registry.capture import is_capturing
from mamba_ops.registry.dispatcher import caller, dispatcher
from mamba_ops.registry.snapshot import COMPOSED as COMPOSED_NAME

if TYPE_CHECKING:
    import torch

    from mamba_ops.registry.op import Op

Refusal = Callable[..., str | None]
Layout = str | Callable[..., str | None]


@dataclass(frozen=True)
class Kernel:
    """One backend's function for one op; `Backend.implements` says what each part is."""

    backend: "Backend"
    implementation: Callable[..., None] | str
    op: "Op[...]"
    unsupported: Refusal | None = None  # its verdict is remembered
    unsupported_layout: Refusal | None = None  # asked before every call
    layouts: Mapping[str, Layout] = field(default_factory=dict, hash=False)
    partial: bool = False
    rehearsed: dict[Any, str] = field(default_factory=dict, hash=False, compare=False, repr=False)
    """Kind of call to why the device cannot run it, or ""."""

    @cached_property
    def function(self) -> Callable[..., None]:
        """The adapter, of the op's own signature; it is loaded at the first use."""
        found = self._found
        if adapters.takes_a_call(self.op.parameters, found):
            declared = self.op.qualname, self.op.parameters, self.op.arguments
            if self.backend.why_failed is None:
                return adapters.adapted(*declared, found)
            shorten, recognised = self.backend.shortcut, adapters.Recognised(self.op.parameters)
            shortcut = None if shorten is None else shorten(found, recognised)
            return adapters.adapted_kernel(*declared, found, failed=self._failed, shortcut=shortcut)
        lacking = self._lacking
        if problem := _difference([p for p in self.op.parameters if p.name not in lacking], found):
            what = f"{self.backend.name} for {self.op.qualname} ({errors.source_of(found)})"
            raise errors.declaration(what, problem)
        return _without(lacking, found) if lacking else found

    @cached_property
    def _found(self) -> Callable[..., None]:
        """The function that was registered."""
        named = self.implementation
        return pkgutil.resolve_name(named) if isinstance(named, str) else named

    @cached_property
    def _lacking(self) -> tuple[str, ...]:
        """Keywords that the op gained and the function does not have: it does what their defaults ask for."""
        if not self.op.added or adapters.takes_a_call(self.op.parameters, self._found):
            return ()
        have = inspect.signature(self._found).parameters
        return tuple(name for name in self.op.added if name not in have)

    @property
    def source(self) -> str:
        """Where the adapter is."""
        return self.implementation if isinstance(self.implementation, str) else errors.source_of(self.implementation)

    def why_not(self, arguments: Mapping[str, Any]) -> str | None:
        """Return why the kernel takes no calls like this one, whatever their strides, or None."""
        for p in self.op.parameters:
            if p.name in self.op.added and arguments.get(p.name, p.default) != p.default and p.name in self._lacking:
                return f"does not know {p.name}"
        return None if self.unsupported is None else self.unsupported(**arguments)

    def why_not_here(self, arguments: Mapping[str, Any], *, rehearses: bool = True) -> str | None:
        """Return why the device cannot run the kernel in calls like this one, or None.

        It is found out before the first call of a kind. Without `rehearses`, and during a capture, only what is known
        already counts.
        """
        if (rehearse := self.backend.rehearse) is None:
            return None
        kind = _kind_of(arguments)
        found = self.rehearsed.get(kind)
        if found is None and rehearses and not is_capturing():
            made = zip(self.op.returns, self.op.allocate(**arguments), strict=True) if self.op.returns else ()
            found = rehearse(self.function, {**arguments, **dict(made)})
            if found is not None:
                self.rehearsed[kind] = found
        return found or None

    def _failed(self, error: Exception, *values: Any) -> Exception:
        """Return what to raise for an error of a call; of one that says that the device cannot run the kernel, remember
        it, so that later calls like this one go elsewhere.
        """
        assert self.backend.why_failed is not None  # for mypy: it is asked for alone where there is one
        if (reason := self.backend.why_failed(error)) is None:
            return error
        named = dict(zip((parameter.name for parameter in self.op.parameters), values, strict=True))
        self.rehearsed[_kind_of({n: value for n, value in named.items() if n not in self.op.returns})] = reason
        dispatcher.changed()
        return errors.NoBackendError(
            f"{self.op.qualname}: {self.backend.name} cannot run this call here: {reason}; it refuses such calls from "
            "now on, and other backends take them; what the op mutates may be written in part",
            {self.backend.name: reason},
        )

    def forget(self) -> None:
        """Find out again what the device can run: the kernel is launched otherwise from now on."""
        self.rehearsed.clear()
        dispatcher.changed()

    def why_not_now(self, arguments: Mapping[str, Any]) -> str | None:
        """Return why a kernel that takes calls like this one does not take these very arguments, or None."""
        return None if self.unsupported_layout is None else self.unsupported_layout(**arguments)


class Backend:
    """What can run ops.

    Args:
        name: the vendor's word, lower case.
        devices: device types that its kernels run on; None for any.
        requires: module that must be importable; it is imported on the first selection on such a device, never before.
        install: what to install where it is missing or broken, for the message.
        usable: asked once, after that import; returns None, or why the package as installed will not do.
        settings: what else about its kernels can be chosen: each setting's name with the values that it may have, the
            default first, kept as `choices`. A configuration calls it `<backend>_<setting>`.
        why_not_setting: given a setting, a value and a device, returns None, or why that device can't have it.
        priority: place in the default order; the highest usable one runs.
        devices_by_name: device types, beyond `devices`, where it runs if asked for by name; a function, because it may
            depend on the environment.
        prepare: called once, when `requires` has been imported.
        rehearse: given a kernel's function and the arguments of a call, returns why the device cannot run it, "" if it
            can, None if that is not known yet. Asked before the first call of a kind (dtypes, ranks, last sizes and
            numbers); nothing that the op mutates may be written.
        why_failed: given an error that a kernel raised, returns why the device cannot run it, None if the error says
            something else. Asked of kernels that take a call as one value.
        shortcut: given a kernel's function that takes a call as one value, and how its op's calls are recognised,
            returns what is called in its place and knows by itself how to run calls like an earlier one, or None.
            Asked where there is a `why_failed`.
    """

    def __init__(
        self,
        name: str,
        *,
        devices: Sequence[str] | None,
        requires: str | None = None,
        install: str | None = None,
        usable: Callable[[], str | None] | None = None,
        priority: int = 0,
        devices_by_name: Callable[[], Sequence[str]] = tuple,
        settings: Mapping[str, Sequence[str]] | None = None,
        why_not_setting: "Callable[[str, str, torch.device], str | None] | None" = None,
        prepare: Callable[[], None] | None = None,
        rehearse: Callable[[Callable[..., None], Mapping[str, Any]], str | None] | None = None,
        why_failed: Callable[[Exception], str | None] | None = None,
        shortcut: Callable[[Callable[[Any], None], adapters.Recognised], adapters.Shortcut | None] | None = None,
    ) -> None:
        if name != name.lower():
            raise errors.declaration(f"backend {name!r}", "names are lower case")
        errors.refuse_duplicate("backend", name, dispatcher.backends.get(name))
        self.name, self.source = name, caller()
        self.devices = None if devices is None else tuple(devices)
        self.devices_by_name = devices_by_name
        self.requires, self.install, self.usable = requires, install or requires, usable
        self.choices = {name: tuple(values) for name, values in (settings or {}).items()}
        self.why_not_setting = why_not_setting
        self._priority, self._prepare = priority, prepare
        self.rehearse, self.why_failed, self.shortcut = rehearse, why_failed, shortcut
        self._import_problem = cache(self._try_import)
        self._unwarned: str | None = None  # why a package that is installed cannot be imported, until it is warned of
        dispatcher.backends[name] = self
        dispatcher.changed()

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    @property
    def priority(self) -> int:
        """Its place in the default order; setting it is a swap."""
        return self._priority

    @priority.setter
    def priority(self, priority: int) -> None:
        self._priority = priority
        dispatcher.changed()

    @property
    def settings(self) -> Mapping[str, str]:
        """Setting to its value in this context; adapters and refusals read it."""
        given = dispatcher.current().settings
        return {n: str(given.get(f"{self.name}_{n}", values[0])) for n, values in self.choices.items()}

    def implements(
        self,
        op: "Op[...]",
        implementation: Callable[..., None] | str | None = None,
        /,
        *,
        unsupported: Refusal | None = None,
        unsupported_layout: Refusal | None = None,
        layouts: Mapping[str, Layout] | None = None,
        partial: bool = False,
    ) -> Any:
        """Register this backend's kernel for `op`; without an implementation, as a decorator.

        Args:
            op: the op.
            implementation: the adapter, or where it is, `package.module:function`: then it is loaded at its first use.
                It has the op's parameters, kinds and defaults, with `output` for `out`; or one parameter, the
                `op.arguments` of a call.
            unsupported: names any of the op's parameters; returns None or a sentence that says why not. It may read
                shapes, dtypes, None-ness and numbers.
            unsupported_layout: the same for what changes between calls of one shape: strides, alignment.
            layouts: for each cache that the kernel keeps in a layout of its own, what a sentence calls that layout; or
                a function that names any of the op's parameters, reads what `unsupported` may, and returns that, or
                None for the op's own layout. A cache in another layout than a kernel's is not given to it.
            partial: of a composed op: calls that the kernel refuses go to the ops inside, which this backend runs too.
                Its name asks for both, unless it is given for this op alone, and nothing is said of a refusal.

        Raises:
            DeclarationError: another signature than the op's (of a path: when it is loaded), or a second kernel.
        """

        what = f"{self.name} for {op.qualname}"
        if stray := sorted(set(layouts or {}) - op.mutates):
            raise errors.declaration(what, f"layouts names {', '.join(stray)}, which the op does not mutate")
        if partial and not op.composed:
            raise errors.declaration(what, "partial is for ops that are composed of others")

        def fitted(given: Any) -> Any:
            return op.adapted(given, op.before_the_call) if callable(given) else given

        def register(adapter: Any) -> Any:
            errors.refuse_duplicate("kernel", what, op.kernels.get(self.name))
            kept = {name: fitted(layout) for name, layout in (layouts or {}).items()}
            kernel = Kernel(self, adapter, op, fitted(unsupported), fitted(unsupported_layout), kept, partial)
            if callable(adapter):
                kernel.function  # noqa: B018  its signature is held against the op's
            op.kernels[self.name] = kernel
            dispatcher.changed()
            return adapter

        return register if implementation is None else register(implementation)

    def is_for(self, device_type: str) -> bool:
        """Return whether its kernels are made for a device type; `why_unusable` says whether they run there."""
        return self.devices is None or device_type in self.devices

    def why_unusable(self, device_type: str, *, by_name: bool = False) -> str | None:
        """Return why no kernel of this backend runs on a device type here, or None."""
        devices = None if self.devices is None else (*self.devices, *(self.devices_by_name() if by_name else ()))
        if devices is not None and device_type not in devices:
            return f"runs on {', '.join(devices)}, not on {device_type}"
        problem = self._import_problem()
        unwarned, self._unwarned = self._unwarned, None
        if unwarned is not None:  # once: a warning that is an error must not end every later call too
            warnings.warn(f"backend {self.name}: {unwarned}", RuntimeWarning, stacklevel=2)
        return problem

    def remove(self) -> None:
        """Take the backend and all its kernels out of the registry again."""
        with dispatcher.lock:
            dispatcher.backends.pop(self.name, None)
            for op in dispatcher.ops.values():
                op.kernels.pop(self.name, None)
            dispatcher.changed()

    def _try_import(self) -> str | None:
        if self.requires is None:
            return None
        try:
            importlib.import_module(self.requires)
            if self._prepare is not None:
                self._prepare()
        except Exception as error:  # an installed package may fail in any way; the sentence carries it on
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is not None and f"{self.requires}.".startswith(f"{missing}."):
                return f"{self.requires} is not installed; pip install '{self.install}'"
            self._unwarned = (
                f"{self.requires} is installed but cannot be imported: {type(error).__name__}: {error}; "
                f"pip install '{self.install}' has what it needs"
            )
            return self._unwarned
        return None if self.usable is None else self.usable()


def _kind_of(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a call shares with those for which the same kernels are compiled: numbers, what is None, and of
    tensors the device, dtype, rank and last size. The sizes of batches, rows and caches are not in it.
    """
    return tuple(
        (v.device, v.dtype, v.dim(), v.shape[-1] if v.dim() > 1 else 0) if isinstance(v, Tensor) else v
        for v in arguments.values()
    )


def _without(names: tuple[str, ...], function: Callable[..., None]) -> Callable[..., None]:
    """Return a function that takes keywords and drops them."""

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> None:
        function(*args, **{name: value for name, value in kwargs.items() if name not in names})

    return called


def _difference(parameters: list[inspect.Parameter], adapter: Callable[..., Any]) -> str | None:
    """Return how an adapter's parameters differ from the op's in name, order, kind or default."""
    got = inspect.signature(adapter).parameters.values()
    want, have = ([f"{p.replace(annotation=p.empty)} ({p.kind.description})" for p in ps] for ps in (parameters, got))
    for w, h in zip(want, have, strict=False):
        if w != h:
            return f"got parameter {h}, expected {w}"
    if len(want) != len(have):
        return f"got {len(have)} parameters, expected {len(want)}: {', '.join(p.name for p in parameters)}"
    return None


def backends() -> list[Backend]:
    """Return all backends in the default order."""
    dispatcher.load_entry_points()
    return sorted(dispatcher.backends.values(), key=lambda b: (-b.priority, b.name))


REFERENCE = Backend("torch", devices=None)
"""The backend of the ops' references; it runs anywhere."""

COMPOSED = Backend(COMPOSED_NAME, devices=None)
"""The backend of composed ops: it runs anywhere, and the ops that they call have backends of their own."""
