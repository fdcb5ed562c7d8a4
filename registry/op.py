"""`Op`, which users call: a contract, its kernels and its facets."""

import inspect
import linecache
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import ParamSpec

from mamba_ops.registry import _torch, codegen, errors, schema, selection, token
from mamba_ops.registry.backend import COMPOSED, REFERENCE, Kernel
from mamba_ops.registry.capture import capture_query
from mamba_ops.registry.decision_cache import CachedDecision, DecisionCache, never_matches, redispatch_query
from mamba_ops.registry.dispatcher import device_of, dispatcher
from mamba_ops.registry.samples import ErrorInput, Sample
from mamba_ops.registry.snapshot import Requests
from mamba_ops.registry.training import Trainable

if TYPE_CHECKING:
    from mamba_ops.registry.namespace import Namespace

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])


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
        splits_graph, reads_host, composed: see `Namespace.op`.
        overload: the `torch.ops` overload, for those who want no front.
        call_undispatched: the op as composed ops call it, which went through torch's dispatcher themselves.
    """

    def __init__(
        self,
        namespace: "Namespace",
        function: Callable[..., Any],
        mutates: frozenset[str],
        *,
        splits_graph: bool,
        reads_host: bool,
        composed: bool,
        reference: Callable[..., Any] | str | None = None,
        arguments: type[tuple[Any, ...]] | None = None,
        replaces: str | None = None,
        returns: tuple[str, ...] = (),
    ) -> None:
        self.name = self.__name__ = function.__name__
        self.namespace, self.qualname = namespace.name, f"{namespace.name}::{self.name}"
        self.source = errors.source_of(function)
        self.mutates, self.returns = mutates, returns
        self.splits_graph, self.reads_host, self.composed = splits_graph, reads_host, composed
        dispatcher.refuse_duplicate("op", self.qualname, dispatcher.ops)
        self.parameters = schema.parameters_of(self.qualname, function, mutates)
        self._names = [p.name for p in self.parameters]
        self._called = [p for p in self.parameters if p.name not in returns]  # what torch's dispatcher hands to the op
        self._tensors = [p.name for p in self._called if codegen.is_tensor(p)]
        self.reference, self.replaces = function, replaces
        self.arguments = arguments or namedtuple("Arguments", self._names)
        if getattr(self.arguments, "_fields", ()) != tuple(self._names):
            got = ", ".join(getattr(self.arguments, "_fields", ()))
            problem = f"arguments has the fields {got}, expected {', '.join(self._names)}"
            raise errors.declaration(f"{self.qualname} ({self.source})", problem)
        self.kernels: dict[str, Kernel] = {}
        self._checks: Callable[..., None] | None = None
        self._outputs: list[Callable[..., Any]] = [self._no_outputs]  # of one, which the front looks up
        self._samples: Callable[..., Iterable[Sample]] | None = None
        self._fills: Callable[..., dict[str, Any]] | None = None
        self.patterns: tuple[str, ...] = ()
        self._call_pattern: Callable[[Any, str], Sample] | None = None
        self._error_inputs: Callable[..., Iterable[ErrorInput]] | None = None
        self._decisions: dict[Requests, DecisionCache] = {}  # by the requests of a context; empty after a swap
        self._all_decisions: dict[Any, DecisionCache] = {}  # by snapshot: a swap back finds them
        self._nothing = {  # what stands for None where calls are compared: one each, for a tensor met twice is no match
            p.name: torch.empty(0, dtype=torch.complex64) for p in self._called if codegen.is_optional(p)
        }
        self._register(namespace)
        own = COMPOSED if composed else REFERENCE
        body = reference or codegen.renamed_output(self.qualname, self.parameters, function)
        self.kernels[own.name] = Kernel(own, body, self)
        dispatcher.ops[self.qualname] = self
        dispatcher.changed()

    def _register(self, namespace: "Namespace") -> None:
        """Define op, body and fake in torch, and write the front."""
        caches = codegen.left_out(self.parameters, self.mutates)
        self._body = codegen.body(
            self.qualname,
            self.parameters,
            caches,
            self.returns,
            outputs=self._outputs,
            decisions=self._decisions,
            active=dispatcher._active.get,
            resolve=partial(token.resolve, self),
            never_matches=never_matches,
            decide=self._decide,
            decide_captured=self._decide_captured,
            refuse_gradient=self._refuse_gradient,
            is_grad_enabled=torch.is_grad_enabled,
            is_inference_mode_enabled=torch.is_inference_mode_enabled,
            **{f"no_{name}": tensor for name, tensor in self._nothing.items()},
        )
        self.schema = schema.infer(self.parameters, caches, self.mutates, self.returns)
        tags = [torch.Tag.cudagraph_unsafe] * self.reads_host
        namespace._define(self.name, self.schema, self._body, self._fake, *tags)
        self.overload = getattr(getattr(torch.ops, namespace.name), self.name).default
        self._write_front()

    def _write_front(self) -> None:
        """Write what users call; again when the op learns to record gradients."""
        caches = codegen.left_out(self.parameters, self.mutates)
        closure: dict[str, Any] = {"overload": self.overload, "dispatch": _torch.dispatch_of(self.overload)}
        closure |= {"is_compiling": torch.compiler.is_dynamo_compiling, "token": token.token}
        closure |= {"is_grad_enabled": torch.is_grad_enabled, "is_transformed": _torch.is_transformed}
        inside: Callable[..., Any] = self._body
        if self.returns:
            call = codegen.functional_front(self.qualname, self._called, record=self.record, **closure)
        else:
            forward = self.forward_op
            sentences = (self._gradient_sentence(p.name) for p in self.parameters)
            call, function = codegen.fronts(
                self.qualname,
                self.parameters,
                sorted(self.mutates),
                caches,
                dispatcher.namespaces[self.namespace]._number(sentences),
                [] if forward is None else [p.name for p in forward._called],
                forward is not None and len(forward.returns) > 1,
                body=self._body,
                outputs=self._outputs,
                refuse=getattr(torch.ops, self.namespace).refuse.default,
                forward=forward,
                **closure,
            )
            inside = function.__get__(self)
        type(self).__call__ = call  # type: ignore[method-assign]
        self.call_undispatched = inside
        self.__signature__ = inspect.signature(call.__get__(self))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Run the op (each op has its own front, generated with its literal signature)."""
        raise NotImplementedError

    def source_code(self) -> str:
        """Return the Python that was generated for this op: its front, and the body that torch's dispatcher calls."""
        parts = (f"<{self.qualname}: {role}>" for role in ("front", "body"))
        return "\n".join("".join(linecache.getlines(part)) for part in parts)

    def __repr__(self) -> str:
        return f"<op {self.qualname}>"

    def __reduce__(self) -> str:
        return self.name  # copied and pickled as what it is: a global of the module that declares it

    # -- facets -------------------------------------------------------------------------------------------------------

    def validate(self, function: F) -> F:
        """Register the checks: they name any of the op's parameters and raise ValueError before anything is written.

        They may read shapes, dtypes, devices and numbers, never strides or values: a verdict is remembered for calls
        that agree in the former.
        """
        self._checks = self._facet(function)
        return function

    def allocate_output(self, function: F) -> F:
        """Register what `out` is: names any of the inputs, returns a new tensor, and never raises on bad input. For an
        op that `returns` tensors: a tuple of them all.
        """
        self._outputs[0] = self._facet(function, [p for p in self._called if p.name != "output"])
        return function

    def samples(self, function: F) -> F:
        """Register the samples: called with a device and static sizes by keyword, yields `Sample`s."""
        self._samples = function
        return function

    def call_patterns(self, *names: str) -> Callable[[F], F]:
        """Register the ways in which the op is called, by name: called with random inputs (which have a number of rows
        and tokens) and one of the names, the decorated function returns a `Sample`. Warm-up, tuning and the tests of
        sizes make such calls.
        """

        def register(function: F) -> F:
            self.patterns, self._call_pattern = names, function
            return function

        return register

    def make_call(self, random: Any, pattern: str) -> Sample:
        """Return a call of one of the op's patterns."""
        if self._call_pattern is None or pattern not in self.patterns:
            known = ", ".join(self.patterns) or "none; add them with @op.call_patterns"
            raise errors.declaration(self.qualname, f"has no call pattern {pattern!r}; it has {known}")
        return self._call_pattern(random, pattern)

    def error_inputs(self, function: F) -> F:
        """Register wrong calls: called with a device, yields an `ErrorInput` for each."""
        self._error_inputs = function
        return function

    def make_error_inputs(self, device: torch.device | str) -> list[ErrorInput]:
        """Return the op's wrong calls on a device; none if it has none."""
        return [] if self._error_inputs is None else list(self._error_inputs(torch.device(device)))

    def default_arguments(self, function: F) -> F:
        """Register what the settings in force give to arguments that the caller left out: it names any of the op's
        parameters and returns the arguments to replace, by name (keyword-only ones), most often none.

        Whether it returns any may depend on the settings and on what checks may read; then it is asked in every call.
        """
        self._fills = self._facet(function)
        dispatcher.changed()
        return function

    @property
    def has_default_arguments(self) -> bool:
        """Whether settings give something to arguments that were left out."""
        return self._fills is not None

    def make_samples(self, device: torch.device | str, **sizes: Any) -> list[Sample]:
        """Return the op's samples on a device; `sizes` are the static sizes and dtypes that its samples know."""
        return list(self.sampler(torch.device(device), **sizes))

    @property
    def sampler(self) -> Callable[..., Iterable[Sample]]:
        """The function that yields the op's samples, of a device and static sizes."""
        if self._samples is None:
            raise errors.declaration(self.qualname, "has no samples; add them with @op.samples")
        return self._samples

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        """Return a new, uninitialised output for these inputs; a tuple for an op that `returns` tensors."""
        return self._outputs[0](*args, **kwargs)

    def _no_outputs(self, *args: Any, **kwargs: Any) -> Tensor:
        raise errors.declaration(
            self.qualname, "was called without `out` and has no @op.allocate_output to allocate it"
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a front call's arguments as checks and kernels get them, with defaults and the output filled in."""
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        if self.returns:
            return arguments | dict(zip(self.returns, self.allocate(**arguments), strict=True))
        if "output" in self.mutates and (out := arguments.pop("out")) is None:
            arguments["output"] = self.allocate(**arguments)
        elif "output" in self.mutates:
            arguments["output"] = out
        return arguments

    def fill(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments with what the settings in force give to those left out."""
        return {**arguments, **(self._fills(**arguments) if self._fills else {})}

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise the ValueError that a call with these arguments would raise, if any."""
        if self._checks is not None:
            try:
                self._checks(**arguments)
            except ValueError as error:
                raise errors.in_call_of(self.qualname, error) from None

    def check_supported(self, *args: P.args, **kwargs: P.kwargs) -> None:
        """Raise what a call with these arguments would raise because the backend asked for by name refuses it.

        For composed ops, before the first op inside writes anything. In the default order some backend takes every
        call, so then nothing is looked at.
        """
        if selection.has_explicit_backend(self):
            arguments = self.fill(self.bind(args, kwargs))
            self.check(arguments)
            selection.require(self, arguments)

    def takes_a_call(self, function: Callable[..., Any]) -> bool:
        """Return whether a function takes a call as one value: its one parameter is none of the op's."""
        found = list(inspect.signature(function).parameters.values())
        return len(found) == 1 and "VAR_" not in found[0].kind.name and found[0].name not in self._names

    # -- called by generated code -------------------------------------------------------------------------------------

    def _decide(self, cache: DecisionCache, key: Any, values: tuple[Any, ...]) -> CachedDecision:
        """Check a call that was not seen before, choose its kernel and remember both; the second time, how it looks."""
        arguments = self._named(values)
        if (known := cache.known.get(key)) is None:
            kernel, _ = self._choose(arguments, cache)
            known = CachedDecision(numbers=key[0], kernel=kernel, is_capturing=capture_query(device_of(arguments)))
        else:
            tensors = [self._nothing[n] if arguments[n] is None else arguments[n] for n in self._tensors]
            known = known._replace(
                must_redispatch=redispatch_query(tensors, known.is_capturing),
                same_tensors=_torch.same_tensors(tensors),
            )
        cache.learn(key, known)
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
            if named is None and _torch.inductor_records(device_of(arguments)):
                raise errors.recording_in_event_loop(self.qualname)
            snapshot = named or snapshot
        with dispatcher.override(snapshot):
            kernel, arguments = self._choose(arguments, DecisionCache(snapshot, is_foreign=selection_token is not None))
            selection.note_capture(self, arguments, has_token=selection_token is not None)
        return kernel

    def _choose(self, called: dict[str, Any], cache: DecisionCache) -> tuple[Callable[..., None], dict[str, Any]]:
        """Check a call; return what runs it, and its arguments with what the settings give to those left out."""
        with dispatcher.override(cache.snapshot):
            arguments = self.fill(called) if self._fills else called
            self.check(arguments)
            kernel = selection.choose(self, arguments, cache)
        given = {} if arguments is called else {n: v for n, v in arguments.items() if v is not called[n]}
        return (self._filling(kernel, given) if given else kernel), arguments

    def _filling(self, kernel: Callable[..., None], first: dict[str, Any]) -> Callable[..., None]:
        """Return a function that runs the kernel with what the settings give, anew in every call.

        `first` was given for the call that is decided on, and is that call's: what a graph captures is drawn once.
        """
        fills, positional = self._fills, [p.name for p in self.parameters if p.kind is not p.KEYWORD_ONLY]
        assert fills is not None
        ready = [first]

        def run(*args: Any, **kwargs: Any) -> None:
            try:
                given = ready.pop()
            except IndexError:
                given = fills(**dict(zip(positional, args, strict=True)), **kwargs)
            kernel(*args, **(kwargs | given))

        return run

    def _named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return {p.name: value for p, value in zip(self._called, values, strict=True)}

    def _refuse_gradient(self, values: tuple[Any, ...]) -> None:
        for p, value in zip(self._called, values, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(self._gradient_sentence(p.name))

    def _gradient_sentence(self, name: str) -> str:
        shown = "out" if name == "output" and not self.returns else name
        return errors.requires_grad(self.qualname, shown, entry=self._gradient_entry())

    def _fake(self, *args: Any, **kwargs: Any) -> Any:
        """Allocate what the op returns. Refuse meta tensors among real ones, which would run nothing."""
        tensors = {n: v for n, v in (*zip(self._names, args, strict=False), *kwargs.items()) if isinstance(v, Tensor)}
        if len({t.is_meta for t in tensors.values()}) > 1:
            expected = next(iter(tensors.values())).device
            name = next(n for n, t in tensors.items() if t.is_meta != (expected.type == "meta"))
            raise errors.two_worlds(self.qualname, name, tensors[name].device, expected)
        if not self.returns:
            return None
        results = self.allocate(*args[: len(self._called)])
        return results if len(results) > 1 else results[0]

    def _facet(self, function: F, parameters: list[inspect.Parameter] | None = None) -> Callable[..., Any]:
        if parameters is None:  # what the op returns is not there yet when a call is checked and decided
            parameters = [p.replace(default=None) if p.name in self.returns else p for p in self.parameters]
        if self.takes_a_call(function):
            return codegen.packed(self.qualname, parameters, self.arguments, function)
        named = [p.name for p in inspect.signature(function).parameters.values() if "VAR_" not in p.kind.name]
        if stray := set(named) - {p.name for p in parameters}:
            problem = f"{function.__name__} names {', '.join(sorted(stray))}, which the op does not have"
            raise errors.declaration(f"{self.qualname} ({errors.source_of(function)})", problem)
        return codegen.subset(self.qualname, parameters, function)
