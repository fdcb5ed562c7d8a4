"""`Op`, which users call: a contract, its kernels and its facets."""

import inspect
import linecache
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from mamba_ops.registry import (
    _torch,
    adapters,
    codegen,
    decomposition,
    errors,
    kinds,
    schema,
    selection,
    sharding,
    token,
    wrappers,
)
from mamba_ops.registry.backend import COMPOSED, REFERENCE, Kernel
from mamba_ops.registry.capture import capture_query, note
from mamba_ops.registry.dispatcher import device_of, dispatcher
from mamba_ops.registry.gradients import refuse_tangents, refuse_traced_transform, refuse_transformed
from mamba_ops.registry.snapshot import CachedDecision, DecisionCache, Requests, never_matches, redispatch_query
from mamba_ops.registry.training import Trainable, register_flop_formulas

if TYPE_CHECKING:
    from mamba_ops.registry.namespace import Namespace

P = ParamSpec("P")

_LIMIT = 4096  # calls that an op remembers per snapshot before it begins again: endless shapes must cost no memory


def require_out(out: Tensor | None) -> Tensor:
    """Return the output tensor that the registry handed to a declared function.

    In the front `out` is optional; inside the op it is always there. This says so, to the reader and to mypy.
    """
    if out is None:
        raise errors.RegistryError("the reference was called without `out`; call the op, or pass a tensor to write")
    return out


def ops() -> Mapping[str, "Op[...]"]:
    """Return all ops by name; where two namespaces share a name, the later op stands under its qualified name."""
    found: dict[str, Op[...]] = {}
    for op in dispatcher.ops.values():
        found[op.name if op.name not in found else op.qualname] = op
    return found


class Op(Trainable, Generic[P]):
    """One op: its contract, its kernels, its samples. Calling it allocates what is missing and returns the output.

    Attributes:
        name, namespace, qualname: `op`, its namespace's name, and `namespace::op`.
        parameters: what checks and kernels get: the schema's parameters (`output` for `out`), without `selection`; a
            cache that may be left out is optional here.
        mutates: names of the parameters that it writes.
        returns: names of those of them that it allocates itself and returns; none for an op that writes into `output`.
        kernels: backend name to kernel; the reference is the kernel of the backend `torch`, or `composed`.
        splits_graph, reads_host, composed, replaces, out_may_be, added, gradients_in: see `Namespace.op`.
        overload: the `torch.ops` overload, for a call without the front.
    """

    splits_graph: bool
    reads_host: bool
    composed: bool
    replaces: str | None
    out_may_be: str | None
    added: tuple[str, ...]

    def __init__(
        self,
        namespace: "Namespace",
        function: Callable[..., Any],
        mutates: frozenset[str],
        reference: Callable[..., Any] | str | None,
        arguments: type[tuple[Any, ...]] | None,
        **flags: Any,
    ) -> None:
        super().__init__()
        vars(self).update(flags)
        self.name = self.__name__ = function.__name__
        self.namespace, self.qualname = namespace.name, f"{namespace.name}::{self.name}"
        errors.refuse_duplicate("op", self.qualname, dispatcher.ops.get(self.qualname))
        self.source, self.reference, self.mutates = errors.source_of(function), function, mutates
        self.parameters = schema.parameters_of(self.qualname, function, mutates)
        self._names = [p.name for p in self.parameters]
        self._called = [p for p in self.parameters if p.name not in self.returns]  # what torch's dispatcher hands to it
        tensors = [p.name for p in self._called if codegen.is_tensor(p)]
        self._written = [i for i, name in enumerate(tensors) if name in mutates]
        self.arguments = arguments or namedtuple("Arguments", self._names)
        if (fields := getattr(self.arguments, "_fields", ())) != tuple(self._names):
            problem = f"arguments has the fields {', '.join(fields)}, expected {', '.join(self._names)}"
            raise errors.declaration(f"{self.qualname} ({self.source})", problem)
        optional = {p.name for p in self._called if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}
        if stray := sorted(set(self.added) - optional):
            problem = f"added names {', '.join(stray)}, expected keywords with defaults"
            raise errors.declaration(f"{self.qualname} ({self.source})", problem)
        self.kernels: dict[str, Kernel] = {}
        self._decisions: dict[Requests, DecisionCache] = {}  # by the requests of a context; empty after a swap
        self._all_decisions: dict[Any, DecisionCache] = {}  # by snapshot: a swap back finds them
        self._nothing = adapters.nothing(self._called)
        self._register(namespace)
        own = COMPOSED if self.composed else REFERENCE
        implementation = reference or adapters.adapted(self.qualname, self.parameters, self.arguments, function)
        self.kernels[own.name] = Kernel(own, implementation, self)
        dispatcher.ops[self.qualname] = self
        dispatcher.changed()

    def _register(self, namespace: "Namespace") -> None:
        """Define op, body and fake in torch, and write the front."""
        caches = self._left_out = codegen.left_out(self.parameters, self.mutates)
        self._body = codegen.body(
            self.qualname,
            self.parameters,
            caches,
            self.mutates,
            self.returns,
            resolve=partial(token.resolve, self),
            never_matches=never_matches,
            decide=self._decide,
            decide_captured=self._decide_captured,
            refuse_gradient=self._refuse_gradient,
            is_inference_mode_enabled=torch.is_inference_mode_enabled,
            strided=torch.strided,
            **self._cells(),
        )
        self.schema = schema.infer(self.parameters, caches, self.mutates, self.returns)
        tags = [torch.Tag.cudagraph_unsafe] * self.reads_host
        namespace._define(self.name, self.schema, self._body, self._fake, *tags)
        namespace._library.impl(self.name, partial(wrappers.run_negated, self), "Negative")
        self.overload = getattr(getattr(torch.ops, namespace.name), self.name).default
        if not self.returns:  # for those that mutate nothing, `decompositions()` does it
            _torch.honour_decompositions(self.overload)
        self._write_front()

    def _cells(self) -> dict[str, Any]:
        """Return what fronts and bodies have in common."""
        return {
            "facets": self.facets,
            "decisions": self._decisions,
            "increment_version": _torch.increment_version(),
            "active": dispatcher.active.get,
            "is_grad_enabled": torch.is_grad_enabled,
            **{f"no_{name}": tensor for name, tensor in self._nothing.items()},
        }

    def _write_front(self) -> None:
        """Write what users call; again when the op learns to record gradients."""
        cells = self._cells() | {"overload": self.overload, "dispatch": _torch.dispatch_of(self.overload)}
        cells |= {"is_compiling": torch.compiler.is_dynamo_compiling, "token": token.token}
        cells |= {"is_transformed": _torch.is_transformed, "is_transform_traced": _torch.is_transform_traced}
        cells["refuse_transformed"] = partial(refuse_transformed, self.qualname)
        cells["refuse_traced_transform"] = partial(refuse_traced_transform, self.qualname)
        cells["explained"] = partial(kinds.explained, self.qualname, self._called, self._validate)
        cells["check_numbers"] = partial(kinds.check_numbers, self._called)
        cells |= {"tensor": Tensor, "is_distributed": sharding.is_distributed}
        cells["register_shardings"] = sharding.register
        if self.returns:
            cells |= {"record": self.record, "refuse_tangents": partial(refuse_tangents, self.qualname)}
            call = codegen.functional_front(self.qualname, self._called, **cells)
        else:
            forward, namespace = self.forward_op, dispatcher.namespaces[self.namespace]
            call, self._inside = codegen.fronts(
                self.qualname,
                self.parameters,
                sorted(self.mutates),
                self._left_out,
                namespace._number(self._gradient_sentence(p.name) for p in self.parameters),
                [p.name for p in self.recorded_parameters],
                "[0]" if forward is not None and len(forward.returns) > 1 else "",
                inside={
                    "dispatch": self._body,
                    "is_compiling": decomposition.is_decomposing,
                    "overload": self.decompose,
                    "token": lambda tensor: None,
                },
                is_watched=_torch.is_watched,
                modules=sys.modules,
                refuse_distributed=partial(sharding.refuse_distributed, self),
                refuse=getattr(torch.ops, self.namespace).refuse.default,
                forward=self.stand_in or forward,
                **cells,
            )
            vars(self).pop("call_undispatched", None)
        call.__qualname__ = self.name  # as Python names it where arguments are missing
        type(self).__call__ = call  # type: ignore[method-assign]
        self.__signature__ = inspect.signature(call.__get__(self))

    @cached_property
    def call_undispatched(self) -> Callable[..., Any]:
        """The op as composed ops call it, which went through torch's dispatcher themselves."""
        return self._body if self.returns else self._inside().__get__(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Run the op (each op has its own front, generated with its literal signature)."""
        raise NotImplementedError

    def decompose(self, *args: Any, **kwargs: Any) -> Any:
        """Run what the op is decomposed to in a program that is to run without it: `registry/decomposition.py`."""
        return decomposition.decompose(self, *args, **kwargs)

    def source_code(self) -> str:
        """Return the Python that was generated for this op: its front, and the body that torch's dispatcher calls."""
        parts = (f"<{self.qualname}: {role}>" for role in ("front", "body"))
        return "\n".join("".join(linecache.getlines(part)) for part in parts)

    def __repr__(self) -> str:
        return f"<op {self.qualname}>"

    def __reduce__(self) -> str:
        return self.name  # copied and pickled as what it is: a global of the module that declares it

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a front call's arguments as checks and kernels get them, with defaults and the output filled in."""
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if self.returns:
            return arguments | dict(zip(self.returns, self.allocate(**arguments), strict=True))
        if "output" in self.mutates:
            out = arguments.pop("out")
            arguments["output"] = self.allocate(**arguments) if out is None else out
        return arguments

    def explained(self, error: Exception, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Exception:
        """Return what to raise for arguments for which something ended in an error: a sentence, if there is one."""
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as wrong:
            return errors.ArgumentTypeError(f"{self.qualname}: {wrong}")
        bound.apply_defaults()
        values = [bound.arguments["out" if p.name == "output" else p.name] for p in self._called]
        return kinds.explained(self.qualname, self._called, self._validate, error, values)

    def check_supported(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Raise what a call with these arguments would raise because the backend asked for by name refuses it.

        For composed ops, before the first op inside writes anything. In the default order some backend takes every
        call, so then nothing is looked at.
        """
        if selection.has_explicit_backend(self):
            arguments = self.fill(self.bind(args, kwargs))
            self.check(arguments)
            taker, reasons = selection.first_taker(self, arguments, snapshot := dispatcher.current())
            if taker is None:
                raise selection.refused(self, reasons, snapshot)

    def _decide(self, cache: DecisionCache, key: Any, values: tuple[Any, ...]) -> CachedDecision:
        """Check a call that was not seen before, choose its kernel and remember both; the second time, how it looks."""
        arguments = self._named(values)
        if (known := cache.known.get(key)) is None:
            kernel, _ = self._choose(arguments, cache)
            known = CachedDecision(numbers=key[0], kernel=kernel, is_capturing=capture_query(device_of(arguments)))
        else:
            given = {**arguments, **{n: tensor for n, tensor in self._nothing.items() if arguments[n] is None}}
            tensors = [value for value in given.values() if isinstance(value, Tensor)]
            known = known._replace(
                must_redispatch=redispatch_query(tensors, known.is_capturing),
                same_tensors=_torch.same_tensors(tensors, self._written),
            )
        if len(cache.known) >= _LIMIT:
            cache.known.clear()
        cache.known[key] = known
        return known

    def _decide_captured(self, values: tuple[Any, ...], selection_token: Tensor | None) -> Callable[..., None]:
        """Choose a kernel for a graph that is being captured, and remember that the op is in one.

        A recording of Inductor's is kept under the selection that its token names. So that is the one which chooses,
        even if another thread has swapped since.
        """
        arguments = self._named(values)
        snapshot = dispatcher.current()
        if selection_token is not None:
            named = token.named_by(selection_token)
            if named is None and _torch.inductor_records():
                raise errors.RegistryError(
                    f"{self.qualname}: got a recording by torch.compile (a CUDA graph) in a thread whose asyncio tasks "
                    "select backends, expected one selection for the thread, as a replay runs no Python that could "
                    "tell tasks apart; enter use_backend around the event loop, run the call in a thread, or compile "
                    "without CUDA graphs"
                )
            snapshot = named or snapshot
        with dispatcher.override(snapshot):
            has_token = selection_token is not None
            kernel, arguments = self._choose(arguments, DecisionCache(snapshot, is_foreign=has_token), is_captured=True)
            taker, refused = selection.first_taker(self, arguments, snapshot)
            if taker is not None:
                note(self, taker.backend.name, refused, device_of(arguments), has_token=has_token)
        return kernel

    def _choose(
        self, called: dict[str, Any], cache: DecisionCache, *, is_captured: bool = False
    ) -> tuple[Callable[..., None], dict[str, Any]]:
        """Check a call; return what runs it, and its arguments with what the settings give to those left out.

        What runs it checks values first, where they are on a CPU or the selection says so; never during a capture,
        which must not wait for the device.
        """
        with dispatcher.override(cache.snapshot):
            arguments = self.fill(called)
            self.check(arguments)
            kernel = selection.choose(self, arguments, cache)
        if not is_captured and (device_of(arguments).type == "cpu" or cache.snapshot.checks_values(self)):
            kernel = wrappers.checking(self, kernel)
        given = {name: value for name, value in arguments.items() if value is not called[name]}
        return (wrappers.filling(self, kernel, given) if given else kernel), arguments

    def _refuse_gradient(self, values: tuple[Any, ...]) -> None:
        """Raise if one of a call's tensors requires grad; called in grad mode."""
        for name, value in self._named(values).items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(self._gradient_sentence(name))

    def _named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return {p.name: value for p, value in zip(self._called, values, strict=True)}

    def _gradient_sentence(self, name: str) -> str:
        shown = "out" if name == "output" and not self.returns else name
        return (
            f"{self.qualname}: {shown}: got a tensor that requires grad while grad mode is on, expected none: "
            f"{self._gradient_entry()} it under torch.no_grad() or torch.inference_mode(), or detach the tensor "
            "(parameters count)"
        )

    def _validate(self, given: Mapping[str, Any]) -> None:
        """Check the shapes and dtypes of a call before it gets to the body, where empty caches are those left out."""
        caches = codegen.left_out(self.parameters, self.mutates)
        empty = {n: None for n in caches if isinstance(given.get(n), Tensor) and not given[n].numel()}
        self.check({p.name: None for p in self.before_the_call} | dict(given) | empty, has_memory=False)

    def _fake(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate what the op returns. Refuse meta tensors among real ones, which would run nothing.

        A call on meta tensors alone is checked. One on fake tensors is a trace: its checks run with the graph.
        """
        given = {p.name: None if p.default is p.empty else p.default for p in self._called}
        given |= dict(zip(given, args, strict=False)) | {n: v for n, v in kwargs.items() if n in given}
        tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
        if len({t.is_meta for t in tensors.values()}) > 1:
            expected = next(iter(tensors.values())).device
            name = next(n for n, t in tensors.items() if t.is_meta != (expected.type == "meta"))
            got = f"got a tensor on {tensors[name].device}, expected {expected}"
            raise ValueError(f"{self.qualname}: {errors.shown(name)}: {got}; move all arguments to one device")
        if all(map(kinds.is_plain, tensors.values())):
            self._validate(given)
        if not self.returns:
            return None
        if self.flop_formula is not None:  # this trace may be partitioned by FLOPs
            register_flop_formulas()
        results = self.allocate(*args[: len(self._called)])
        return results if len(results) > 1 else results[0]
