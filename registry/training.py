"""Ops that record gradients: a functional forward op and a backward op, joined for autograd, torch.compile, torch.func.

An op that writes into `out` and caches can't be differentiated by torch. It gets companions, declared by two facets:

    @scan.training(
        differentiable=("x", "weight", "initial_states"),
        results={"output": new_output, "final_states": new_states},     # each names inputs and returns a new tensor
        batched=("x", "initial_states"),
    )
    def _forward(
        x: Tensor,
        weight: Tensor,
        initial_states: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        silu: bool = True,
        *,
        output: Tensor,
        final_states: Tensor | None,
    ) -> None:
        scan.call_undispatched(...)     # writes output and, where it is there, final_states

    @scan.backward
    def _backward(call: Any) -> None:   # call.grad_output, .grad_final_states, .x, ..., .grad_x, .grad_weight, ...
        call.grad_x.copy_(...)          # every gradient is written: empty tensors stand for inputs that are None

The checks of the op run in its companions, too, with None for each parameter that the function does not have.

That makes three ordinary ops, with backends (`triton.implements(scan.backward_op, ...)`), refusals and selections:

- `scan.forward_op`, `<name>_forward`: the inputs to `output` (and to what `saves` names). Composed: the kernels of
  `scan` run inside. `scan` itself calls it where gradients are asked for and no other tensor (cache, `out`) is given.
- `scan.forward_states_op`, `<name>_forward_states`, where the forward function has one optional result: returns it too.
- `scan.backward_op`, `<name>_backward`: the gradients of the results, of the optional one None where it has none, the
  inputs and what was saved, to the gradients of `differentiable`, each of its input's shape and dtype.

Inputs and what `saves` names are all that is kept for the backward, so that it may run on another backend. It runs
under the selection of the forward, unless `use_backend` surrounds it.

A composed op has no companions. What it is made of records gradients, in a function that `recorded_as` registers.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mamba_ops.registry import codegen, errors
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.facets import Facets
from mamba_ops.registry.gradients import Declaration, Formula
from mamba_ops.registry.samples import Sample

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op

F = TypeVar("F", bound=Callable[..., Any])
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
R = TypeVar("R", bound=Callable[..., Any] | str)


class Trainable(Facets):
    """The facets of an op that records gradients.

    Attributes:
        forward_op, forward_states_op, backward_op: its companions; None without them.
        record: of an op that is such a forward: records an eager call; None for others.
        flop_formula: of a companion: its floating-point operations, of the shapes of its arguments.
        stand_in: what runs in the place of a composed op where gradients are asked for; None for others.
    """

    name: str
    namespace: str
    gradients_in: str | None
    _write_front: Callable[[], None]

    forward_op: "Op[...]" = None  # type: ignore[assignment]  # typed for the callers of those that have them
    forward_states_op: "Op[...]" = None  # type: ignore[assignment]
    backward_op: "Op[...]" = None  # type: ignore[assignment]
    record: Callable[..., Any] | None = None
    flop_formula: Callable[..., int] | None = None
    stand_in: Callable[..., Tensor] | None = None
    _training: Declaration | None = None

    def training(
        self,
        *,
        differentiable: Sequence[str],
        results: Mapping[str, Callable[..., Tensor]],
        saves: Sequence[str] = (),
        batched: Sequence[str] = (),
        validate: Callable[..., None] | None = None,
    ) -> Callable[[F], F]:
        """Declare the decorated function as the forward of the op's companions: see this module.

        Args:
            differentiable: inputs that have gradients.
            results: what the function writes, by name, each with what allocates it: a function that names any of the
                inputs and never raises on bad input. The function's keyword-only parameters; one may be optional.
            saves: those of the results that only the backward gets.
            batched: inputs whose first dimension is the batch, into which torch.func.vmap is folded.
            validate: checks what the op's own checks do not know, by names of inputs.
        """

        def register(function: F) -> F:
            declared = inspect.signature(function).parameters.values()
            inputs = [p for p in declared if p.name not in results]
            optional = [p.name for p in declared if p.name in results and codegen.is_optional(p)]
            written, known = [p.name for p in declared if p.name in results], {p.name for p in inputs}
            what = f"{self.qualname}: training ({errors.source_of(function)})"
            if stray := [*{*results} - {*written}, *{*differentiable, *batched} - known, *{*saves} - {*results}]:
                raise errors.declaration(what, f"names {', '.join(sorted(stray))}, which the function does not have")
            if len(optional) > 1:
                raise errors.declaration(what, f"got the optional results {', '.join(optional)}, expected at most one")
            self._training = Declaration(
                function,
                tuple(differentiable),
                {name: results[name] for name in written},
                tuple(saves),
                tuple(batched),
                validate,
                inputs,
                optional[0] if optional else None,
            )
            return function

        return register

    def backward(self, reference: R, arguments: type[tuple[Any, ...]] | None = None) -> R:
        """Register the reference of the backward op, which writes every gradient; this makes the companions.

        Args:
            reference: a function of the op's parameters, or of one value of `backward_op.arguments`; or where it is,
                `package.module:function`.
            arguments: the NamedTuple of a call's arguments; None: one is made.
        """
        if (declared := self._training) is None:
            raise errors.declaration(f"{self.qualname}: backward", "declare @op.training first")
        self.backward_op = self._declare_backward(declared, reference, arguments)
        self.backward_op.by_rows = True  # many go in slices
        self.forward_op = self._declare_forward(declared, "forward", declared.optional)
        if declared.optional is not None:
            self.forward_states_op = self._declare_forward(declared, "forward_states", None)
        self._write_front()
        return reference

    def recorded_as(self, function: F) -> F:
        """Register what stands for calls of a composed op that ask for gradients: a function of tensors, made of ops
        that record them, that returns the op's output.

        It takes any of the op's parameters by name. A call runs it, eager or traced, that gives no other tensor, so it
        makes the op's checks itself, and refuses a DTensor.
        """
        names = inspect.signature(function).parameters.keys()
        if stray := sorted(names - {p.name for p in self.parameters}):
            what = f"{self.qualname}: recorded_as ({errors.source_of(function)})"
            raise errors.declaration(what, f"names {', '.join(stray)}, which the op does not have")
        self.stand_in = function
        self._write_front()
        return function

    def training_samples(self, function: F) -> F:
        """Register the samples of the forward companions, as `Op.samples` does; the backward's are made of them."""
        for op in (self.forward_op, self.forward_states_op):
            if op is not None:
                op.samples(function)
        forward, backward = self.forward_states_op or self.forward_op, self.backward_op

        @backward.samples
        @torch.no_grad()
        def _samples(device: torch.device, **sizes: Any) -> Iterator[Sample]:
            for number, sample in enumerate(forward.make_samples(device, **sizes)):
                results = forward(*sample.args)
                named = dict(zip(forward.returns, results if isinstance(results, tuple) else (results,), strict=True))
                named |= zip((p.name for p in forward._called), sample.args, strict=True)
                generator, arguments = torch.Generator().manual_seed(number), []
                for p in backward._called:
                    if (result := named.get(p.name.removeprefix("grad_"))) is not None and p.name not in named:
                        grad = torch.randn(result.shape, generator=generator).to(result)
                        arguments.append(None if codegen.is_optional(p) and number % 2 else grad)
                    else:
                        arguments.append(named[p.name])
                yield Sample(sample.name, tuple(arguments))

        return function

    def sharding(
        self, function: Callable[..., Sequence[Mapping[str, int]]]
    ) -> Callable[..., Sequence[Mapping[str, int]]]:
        """Register how the companions run on DTensors, `registry/sharding.py`: the function names any of the forward's
        inputs, which are None or have a shape and an ndim, and returns the ways to split them.
        """
        if self._training is None:
            raise errors.declaration(f"{self.qualname}: sharding", "declare @op.training first")
        split = self.adapted(function, self._training.inputs)
        for op in self.companions:
            op.facets["sharding"] = split
        return function

    def flops(self, function: Callable[..., tuple[int, int]]) -> Callable[..., tuple[int, int]]:
        """Register how many floating-point operations a call makes, for `flop_formulas`.

        The function names any of the forward's inputs, gets shapes for tensors, and returns the operations of the
        forward and of the backward.
        """
        assert self._training is not None
        count = self.adapted(function, self._training.inputs)
        names = [p.name for p in self._training.inputs]
        for op in self.companions:
            op.flop_formula = _flop_formula(count, [p.name for p in op._called], names, int(op is self.backward_op))
        return function

    @property
    def recorded_parameters(self) -> list[inspect.Parameter]:
        """The parameters of those calls that the op records gradients of; none where it records none."""
        if self.stand_in is not None:
            return list(inspect.signature(self.stand_in).parameters.values())
        return [] if self.forward_op is None else self.forward_op._called

    @property
    def companions(self) -> "list[Op[...]]":
        """The ops that record this one's gradients; none where it records none."""
        return [op for op in (self.forward_op, self.forward_states_op, self.backward_op) if op is not None]

    def _gradient_entry(self) -> str:
        """Return when the op records gradients and what to call then, up to how to call the op without gradients."""
        if not self.recorded_parameters:
            other = "" if self.gradients_in is None else f", {self.gradients_in} does"
            return f"this op does not record gradients{other}; {'else ' if other else ''}call"
        taken = ", ".join(p.name for p in self.recorded_parameters if codegen.is_tensor(p))
        return (
            f"this op records gradients where no other tensors are given than {taken}; for gradients of states call "
            f"{self.gradients_in or f'{self.namespace}.functional.{self.name}'}; else call"
        )

    def _declare_forward(self, declared: Declaration, suffix: str, without: str | None) -> "Op[...]":
        results = {name: allocate for name, allocate in declared.results.items() if name != without}
        written = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Tensor) for name in results]
        what = f"The tensors {', '.join(results)} of `{self.name}`, computed by its kernels: see there."
        fixed = {} if without is None else {without: None}
        function = _with_signature(f"{self.name}_{suffix}", what, declared.forward, [*declared.inputs, *written], fixed)
        op = self._new_op(function, tuple(results), declared, composed=True)
        allocators = [op.adapted(allocate, op._called) for allocate in results.values()]

        @op.allocate_output
        def _allocate(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            return tuple(allocate(*args, **kwargs) for allocate in allocators)

        formula = Formula(self.qualname, op, self.backward_op, declared)
        dispatcher.namespaces[self.namespace]._differentiate(op.name, formula.gradients, formula.setup_context)
        op.record = formula.recorder()
        op._write_front()
        return op

    def _declare_backward(
        self, declared: Declaration, reference: Callable[..., None] | str, arguments: type[tuple[Any, ...]] | None
    ) -> "Op[...]":
        def tensor(name: str, kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD, optional: bool = False) -> Any:
            return inspect.Parameter(name, kind, annotation=Tensor | None if optional else Tensor)

        gradients = tuple(f"grad_{name}" for name in declared.differentiable)
        parameters = [
            *(
                tensor(f"grad_{n}", optional=n == declared.optional)
                for n in declared.results
                if n not in declared.saves
            ),
            *(p.replace(default=p.empty) for p in declared.inputs),
            *(tensor(name) for name in declared.saves),
            *(tensor(name, inspect.Parameter.KEYWORD_ONLY) for name in gradients),
        ]
        what = f"The gradients of `{self.name}`; an empty tensor for an input that is None."
        function = _with_signature(f"{self.name}_backward", what, declared.forward, parameters, {})
        op = self._new_op(function, gradients, declared, reference=reference, arguments=arguments)

        names = [p.name for p in op._called]
        places = [names.index(name) for name in declared.differentiable]

        @op.allocate_output
        def _allocate(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
            given = dict(zip(names, args, strict=False)) | kwargs if kwargs else None
            values = args if given is None else [given[name] for name in names]
            like = next(value for value in values if isinstance(value, Tensor))
            inputs = [values[i] for i in places]
            return tuple([like.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs])

        return op

    def _check_calls_of(self, op: "Op[...]", declared: Declaration) -> None:
        """Let a companion check what the op does, what the declaration does, and the shapes of gradients."""
        names = {p.name for p in declared.inputs}
        others = {p.name: None if p.default is p.empty else p.default for p in self.parameters if p.name not in names}
        shared = names & {p.name for p in self.parameters}
        own = op.adapted(declared.validate or (lambda: None), declared.inputs)
        results = {n: op.adapted(make, declared.inputs) for n, make in declared.results.items()}

        @op.validate
        def _check(*args: Any, **_: Any) -> None:
            arguments = dict(zip((p.name for p in op._called), args, strict=False))
            inputs = {name: arguments[name] for name in names}
            if (checks := self.facets.get("validate")) is not None:
                checks(**others, **{name: inputs[name] for name in shared})
            own(**inputs)
            for name, make in results.items():
                if (got := arguments.get(f"grad_{name}")) is None:
                    continue
                if got.shape != (shape := make(**inputs).shape):
                    raise errors.bad_argument(f"grad_{name}", got=f"shape {tuple(got.shape)}", expected=tuple(shape))
                if got.dtype not in _FLOATS:
                    raise errors.bad_argument(
                        f"grad_{name}", got=got.dtype, expected="a float dtype of 16 bits or more"
                    )

        @op.validate_values
        def _check_values(*args: Any, **_: Any) -> None:
            arguments = dict(zip((p.name for p in op._called), args, strict=False))
            checks = self.facets.get("validate_values")
            if checks is not None and not op.composed:  # what is inside a composed op looks itself
                checks(**others, **{name: arguments[name] for name in shared})

    def _new_op(
        self, function: Callable[..., None], returns: tuple[str, ...], declared: Declaration, **options: Any
    ) -> "Op[...]":
        declare = dispatcher.namespaces[self.namespace].op(mutates=returns, returns=returns, **options)
        op: Op[...] = declare(function)
        self._check_calls_of(op, declared)
        return op


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas of all ops that have one, as `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)`
    takes them.
    """
    return {
        op.overload.overloadpacket: op.flop_formula for op in dispatcher.ops.values() if op.flop_formula is not None
    }


def register_flop_formulas() -> None:
    """Register them with `torch.utils.flop_counter`, for every `FlopCounterMode`, and for AOTAutograd's partitioner.

    The first trace does that, and `mamba_ops.training`. It is not done sooner: that module imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for packet, formula in flop_formulas().items():
        if packet not in flop_registry:
            register_flop_formula(packet)(formula)


def save_ops() -> list[Any]:
    """Return the forward ops that record gradients, as selective activation checkpointing takes ops to save.

    `torch.utils.checkpoint.create_selective_checkpoint_contexts` takes the list itself; a policy function, or a list of
    ops of others, may contain it. What these ops return is then kept, and a recomputation does not run them again.
    """
    return [op.overload for op in dispatcher.ops.values() if op.record is not None]


def _flop_formula(
    count: Callable[..., tuple[int, int]], called: list[str], names: list[str], direction: int
) -> Callable[..., int]:
    """Return the formula of a companion that is called with these arguments, of one that takes the forward's."""

    def formula(*shapes: Any, **_: Any) -> int:
        given = dict(zip(called, shapes, strict=False))
        return int(count(*(given[name] for name in names))[direction])

    return formula


def _with_signature(
    name: str, doc: str, function: Callable[..., None], parameters: list[inspect.Parameter], fixed: Mapping[str, None]
) -> Callable[..., None]:
    """Return a function of this name and signature that calls another one."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs, **fixed)

    call.__name__, call.__doc__ = name, doc
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call
