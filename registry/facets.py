"""Facets of an op: what its declaration says besides the signature, each a function that a decorator registers."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mamba_ops.registry import adapters, errors, kinds, memory
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.samples import ErrorInput, Sample

F = TypeVar("F", bound=Callable[..., Any])


class Facets:
    """The facets of an op, and what is made with them; `Op` is one.

    A new facet is a method that stores its function under the method's name.

    Attributes:
        facets: the functions by the name of their decorator; those that take an op's parameters have its signature.
        patterns: names of the ways in which the op is called.
        by_rows: whether calls of many rows run other kernels than those of few: warm-ups then make both.
        bench_peers, host_call: what `bench_peer` and `bench_host` say.
    """

    qualname: str
    parameters: list[inspect.Parameter]
    arguments: type[tuple[Any, ...]]
    mutates: frozenset[str]
    returns: tuple[str, ...]
    out_may_be: str | None

    def __init__(self) -> None:
        self.facets: dict[str, Callable[..., Any]] = {"allocate_output": self._no_output}
        self.patterns: tuple[str, ...] = ()
        self.by_rows = False
        self.bench_peers: dict[str, Callable[..., Any]] = {}
        self.host_call: tuple[str, int, int, dict[str, int]] | None = None

    def validate(self, function: F) -> F:
        """Register the checks: they name any of the op's parameters and raise ValueError before anything is written.

        They may read shapes, dtypes, devices and numbers, never strides or values: a verdict is remembered for calls
        that agree in the former.
        """
        return self._store("validate", function, self.before_the_call)

    def validate_values(self, function: F) -> F:
        """Register the checks that read values: they name any of the op's parameters and raise ValueError.

        They run before the kernel in every call on a CPU, and elsewhere where `checking()` says so, as they wait for
        the device.
        """
        return self._store("validate_values", function, self.parameters)

    def allocate_output(self, function: F) -> F:
        """Register what `out` is: names any of the inputs, returns a new tensor, and never raises on bad input. For an
        op that `returns` tensors: a tuple of them all.
        """
        written = {"output", *self.returns}
        return self._store("allocate_output", function, [p for p in self.parameters if p.name not in written])

    def default_arguments(self, function: F) -> F:
        """Register what the settings in force give to arguments that the caller left out: it names any of the op's
        parameters and returns the arguments to replace, by name (keyword-only ones), most often none.

        Whether it returns any may depend on the settings and on what checks may read; then it is asked in every call.
        """
        return self._store("default_arguments", function, self.parameters)

    def meant(self, function: F) -> F:
        """Register what tensors that the op mutates stand for, where that is not their own numbers: it names any of the
        op's parameters and returns by name what is meant, in float64, and how far apart neighbours are there; None for
        what only others are read with. Tests compare that.
        """
        return self._store("meant", function, self.parameters)

    def decomposition(self, function: F) -> F:
        """Register what the op is decomposed to in exported programs, where that is not its reference: it names any of
        the op's parameters, and neither reads values on the host nor branches on sizes that may vary.
        """
        return self._store("decomposition", function, self.before_the_call)

    def samples(self, function: F) -> F:
        """Register the samples: called with a device and static sizes by keyword, yields `Sample`s."""
        return self._store("samples", function)

    def error_inputs(self, function: F) -> F:
        """Register wrong calls: called with a device, yields an `ErrorInput` for each."""
        return self._store("error_inputs", function)

    def call_patterns(self, *names: str) -> Callable[[F], F]:
        """Register the ways in which the op is called, by name: called with random inputs (which have a number of rows
        and tokens) and one of the names, the decorated function returns a `Sample`. Warm-up, tuning and the tests of
        sizes make such calls.
        """
        self.patterns = names
        return lambda function: self._store("call_patterns", function)

    def bench_cases(self, function: F) -> F:
        """Register what benchmarks time: called with a scale ("large" for a GPU, "small" for a CPU), yields functions
        that each make a `mamba_ops.testing.Case` on a device.
        """
        return self._store("bench_cases", function)

    def bench_host(self, pattern: str, rows: int, length: int, **sizes: int) -> None:
        """Name the call of which it is timed what it costs the host: of one of the call patterns, by its sizes."""
        self.host_call = pattern, rows, length, sizes

    def bench_peer(self, name: str) -> Callable[[F], F]:
        """Register another project's kernel: called with a case and a function that imports a module by its name, or
        raises ImportError, returns the call to time; or raises `mamba_ops.testing.NotTaken`.
        """

        def register(function: F) -> F:
            self.bench_peers[name] = function
            return function

        return register

    def check(self, arguments: Mapping[str, Any], *, has_memory: bool = True) -> None:
        """Raise the ValueError that a call with these arguments would raise, if any.

        Args:
            arguments: the call's, by parameter name.
            has_memory: whether to look at where the tensors lie, too.
        """
        try:
            kinds.check(arguments)
            if "validate" in self.facets:
                self.facets["validate"](**arguments)
            if has_memory:
                self.check_memory(arguments)
        except ValueError as error:
            raise errors.in_call_of(self.qualname, error) from None

    def check_memory(self, arguments: Mapping[str, Any]) -> None:
        """Raise the ValueError about where a call's tensors lie, if there is one."""
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        memory.check(tensors, self.mutates, self.out_may_be)

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        """Return a new, uninitialised output for these inputs; a tuple for an op that `returns` tensors."""
        return self.facets["allocate_output"](*args, **kwargs)

    def fill(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call's arguments with what the settings in force give to those left out."""
        fills = self.facets.get("default_arguments")
        return {**arguments, **(fills(**arguments) if fills else {})}

    def make_samples(self, device: torch.device | str, **sizes: Any) -> list[Sample]:
        """Return the op's samples on a device; `sizes` are the static sizes and dtypes that its samples know."""
        return list(self.sampler(torch.device(device), **sizes))

    @property
    def sampler(self) -> Callable[..., Iterable[Sample]]:
        """The function that yields the op's samples, of a device and static sizes."""
        if "samples" not in self.facets:
            raise errors.declaration(self.qualname, "has no samples; add them with @op.samples")
        return self.facets["samples"]

    def make_error_inputs(self, device: torch.device | str) -> list[ErrorInput]:
        """Return the op's wrong calls on a device; none if it has none."""
        return list(self.facets["error_inputs"](torch.device(device))) if "error_inputs" in self.facets else []

    def make_call(self, random: Any, pattern: str) -> Sample:
        """Return a call of one of the op's patterns."""
        if pattern not in self.patterns:
            known = ", ".join(self.patterns) or "none; add them with @op.call_patterns"
            raise errors.declaration(self.qualname, f"has no call pattern {pattern!r}; it has {known}")
        call: Sample = self.facets["call_patterns"](random, pattern)
        return call

    @property
    def before_the_call(self) -> list[inspect.Parameter]:
        """The parameters as checks and refusals get them: what the op returns is not there yet, and None."""
        return [p.replace(default=None) if p.name in self.returns else p for p in self.parameters]

    def adapted(self, function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> Callable[..., Any]:
        """Return a function of these parameters for one that names some of them, or takes one `op.arguments` of all."""
        names = {p.name for p in parameters}
        named = {p.name for p in inspect.signature(function).parameters.values() if "VAR_" not in p.kind.name}
        if (stray := named - names) and not adapters.takes_a_call(self.parameters, function):
            problem = f"{function.__name__} names {', '.join(sorted(stray))}, which the op does not have"
            raise errors.declaration(f"{self.qualname} ({errors.source_of(function)})", problem)
        return adapters.adapted(self.qualname, list(parameters), self.arguments, function)

    def _store(self, facet: str, function: F, parameters: Sequence[inspect.Parameter] | None = None) -> F:
        self.facets[facet] = function if parameters is None else self.adapted(function, parameters)
        dispatcher.changed()
        return function

    def _no_output(self, *args: Any, **kwargs: Any) -> Tensor:
        problem = "was called without `out` and has no @op.allocate_output to allocate it"
        raise errors.declaration(self.qualname, problem)
