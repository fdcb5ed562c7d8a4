"""How a forward op and a backward op are joined: for traced calls, for eager ones, and for torch.func.

Traced calls take `torch.library.register_autograd`, eager ones an autograd.Function over the same ops, which is three
times as fast, and calls under torch.func another one, as it asks for.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.registry import _torch, codegen
from mamba_ops.registry.dispatcher import dispatcher
from mamba_ops.registry.token import token as selection_token

if TYPE_CHECKING:
    from mamba_ops.registry.op import Op


class Declaration(NamedTuple):
    """What `Op.training` was told."""

    forward: Callable[..., None]
    differentiable: tuple[str, ...]
    results: Mapping[str, Callable[..., Tensor]]
    saves: tuple[str, ...]
    batched: tuple[str, ...]
    validate: Callable[..., None] | None
    inputs: list[inspect.Parameter]
    optional: str | None  # the result that a call may not want


class Formula:
    """How one forward op is differentiated; what autograd, AOTAutograd and torch.func share."""

    def __init__(self, name: str, forward: "Op[...]", backward: "Op[...]", declared: Declaration) -> None:
        self.name, self.forward, self.declared = name, forward, declared
        self.overload, self.backward = forward.overload, backward.overload
        self.tensors = [codegen.is_tensor(p) for p in forward._called]
        self.names = [p.name for p in forward._called]
        self.gradients_of = [f"grad_{n}" for n in declared.results if n not in declared.saves]
        # For eager calls, which no dict is to slow: where the backward's gradients stand among the results, tensors and
        # numbers among the inputs, inputs among all tensors and all numbers, and the gradients that are found.
        results = list(forward.returns)
        names = [name.removeprefix("grad_") for name in self.gradients_of]
        self._grads = [results.index(name) if name in results else -1 for name in names]
        where = range(len(self.tensors))
        self._tensors, self._numbers = ([i for i in where if self.tensors[i] is kind] for kind in (True, False))
        kept = len(self._tensors) + len(declared.saves)
        self._values = [
            self._tensors.index(i) if t else kept + self._numbers.index(i) for i, t in enumerate(self.tensors)
        ]
        self._saved = list(range(len(self._tensors), kept))
        self._found = [declared.differentiable.index(n) if n in declared.differentiable else -1 for n in self.names]
        self._backward = _torch.dispatch_of(self.backward)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs, what the forward saved, and what was selected.

        `inputs` may end in the selection token: in a graph it names the selection; in eager calls the snapshot does.
        """
        saved = self._saved_of(ctx, output)
        *values, token = inputs if len(inputs) > len(self.names) else (*inputs, None)
        ctx.save_for_backward(
            *(value for value, is_tensor in zip(values, self.tensors, strict=True) if is_tensor), *saved, token
        )
        ctx.numbers = [value for value, is_tensor in zip(values, self.tensors, strict=True) if not is_tensor]
        ctx.set_materialize_grads(False)
        ctx.snapshot, ctx.count = dispatcher.current(), len(inputs)

    def gradients(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run the backward op on what was kept; return a gradient, or None, for each input of the forward."""
        return self._gradients(ctx, ctx.saved_tensors, ctx.count, grads)

    def _gradients(
        self, ctx: Any, kept: tuple[Any, ...], count: int, grads: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        *saved, token = kept
        if not torch.compiler.is_dynamo_compiling() and _torch.is_transformed():
            refuse_tangents(self.name, (*grads, *saved))
        tensors, numbers = iter(saved), iter(ctx.numbers)
        values = [next(tensors if is_tensor else numbers) for is_tensor in self.tensors]
        given = dict(zip((f"grad_{name}" for name in self.forward.returns), grads, strict=True))
        with torch.no_grad():
            for name in self.gradients_of:
                if given.get(name) is None and name != f"grad_{self.declared.optional}":
                    result = self.forward.allocate(*values)[self.forward.returns.index(name.removeprefix("grad_"))]
                    given[name] = torch.zeros_like(result)
            inputs = *(given.get(name) for name in self.gradients_of), *values, *tensors
            if torch.compiler.is_dynamo_compiling():  # compiled autograd traces this
                found = self.backward(*inputs, selection_token(saved[0]) if token is None else token)
            else:
                snapshot = dispatcher.current() if dispatcher.active.get().requests else ctx.snapshot
                with dispatcher.override(snapshot):
                    found = self.backward(*inputs, token)
        found = (found,) if isinstance(found, Tensor) else found
        if torch.is_grad_enabled():  # create_graph=True, or torch.func: whoever differentiates the gradient is told
            sources = [t for t in (*grads, *saved) if t is not None]
            found = _Once.apply(self.name, len(found), *found, *sources)  # type: ignore[no-untyped-call]
        by_name = dict(zip(self.declared.differentiable, found, strict=True))
        ordered = [None if value is None else by_name.get(name) for name, value in zip(self.names, values, strict=True)]
        return (*ordered, *[None] * (count - len(ordered)))

    def _saved_of(self, ctx: Any, output: Any) -> list[Tensor]:
        """Return what the forward saved, marked as having no gradients."""
        if not self.declared.saves:
            return []
        results = dict(zip(self.forward.returns, (output,) if isinstance(output, Tensor) else output, strict=True))
        saved = [results[name] for name in self.declared.saves]
        ctx.mark_non_differentiable(*saved)
        return saved

    def setup_eager(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Do what `setup_context` does, in an eager call."""
        saved = self._saved_of(ctx, output)
        ctx.save_for_backward(*[inputs[i] for i in self._tensors], *saved)
        ctx.numbers = [inputs[i] for i in self._numbers]
        ctx.set_materialize_grads(False)
        ctx.snapshot = dispatcher.current()

    def gradients_of_eager(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Do what `gradients` does, for an eager call."""
        if torch.compiler.is_dynamo_compiling():  # compiled autograd traces this
            return self._gradients(ctx, (*ctx.saved_tensors, None), len(self.names), grads)
        saved, snapshot = ctx.saved_tensors, ctx.snapshot
        if any(grads[i] is None for i in self._grads if i >= 0) or torch.is_grad_enabled() or _torch.is_transformed():
            return self._gradients(ctx, (*saved, None), len(self.names), grads)
        kept = (*saved, *ctx.numbers)
        values = [kept[i] for i in self._values]
        given = [None if i < 0 else grads[i] for i in self._grads]
        inputs = *given, *values, *[kept[i] for i in self._saved]
        current = dispatcher.current()
        if current is snapshot or current.active.requests:
            found: Any = self._backward(*inputs)
        else:  # on a thread of autograd's, where no `use_backend` of the forward holds
            with dispatcher.override(snapshot):
                found = self._backward(*inputs)
        if isinstance(found, Tensor):
            found = (found,)
        return tuple(None if i < 0 or value is None else found[i] for i, value in zip(self._found, values, strict=True))

    def recorder(self) -> Callable[..., Any]:
        """Return what runs an eager call of the forward op and records it."""
        formula, dispatch = self, _torch.dispatch_of(self.overload)

        class Joined(torch.autograd.Function):
            @staticmethod
            def jvp(ctx: Any, *tangents: Any) -> Any:
                raise no_jvp(formula.name)

        class Recorded(Joined):
            """For eager calls: with setup_context in the forward it is the fastest that torch has."""

            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                with _torch.below_autograd():
                    output = dispatch(*inputs)
                formula.setup_eager(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:  # a function of its own, which compiled autograd traces
                return formula.gradients_of_eager(ctx, *grads)

        class Transformed(Joined):
            """For calls under torch.func."""

            setup_context = staticmethod(formula.setup_context)
            backward = staticmethod(formula.gradients)

            @staticmethod
            def forward(*inputs: Any) -> Any:
                return formula.overload(*inputs)

            @staticmethod
            def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
                mapped = formula.folded(info.batch_size, in_dims, inputs)
                output = Transformed.apply(*mapped)  # type: ignore[no-untyped-call]
                if isinstance(output, Tensor):
                    return output.unflatten(0, (info.batch_size, -1)), 0
                return tuple(o.unflatten(0, (info.batch_size, -1)) for o in output), tuple(0 for _ in output)

        metaclass: Any = type(Recorded)
        recorded = metaclass(self.name.partition("::")[2], (Recorded,), {})  # as profiles and `grad_fn` show it

        def record(*inputs: Any) -> Any:
            if not _torch.is_transformed():
                return recorded.apply(*inputs)
            pairs = zip(inputs, formula.tensors, strict=True)  # torch.func would wrap a number that is a tensor
            return Transformed.apply(*(v if t or not isinstance(v, Tensor) else v.item() for v, t in pairs))  # type: ignore[no-untyped-call]

        return record

    def folded(self, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
        """Return the inputs of a call under vmap with the mapped dimension folded into the batch, or refuse."""
        folded = []
        for name, dim, value in zip(self.names, in_dims, inputs, strict=True):
            if not isinstance(value, Tensor):
                folded.append(value)
            elif name in self.declared.batched:
                value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
                folded.append(value.flatten(0, 1))
            elif dim is not None or name not in self.declared.differentiable:  # an index of packed rows
                raise not_batched(self.name, name, self.declared.batched)
            else:
                folded.append(value)
        return folded


class _Once(torch.autograd.Function):
    """Hands gradients on, and raises where one of them is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name}: its gradient was differentiated again, which it has no formula for; compute second "
            "derivatives through a plain torch implementation, or detach the gradient"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_jvp(ctx.name)


def refuse_traced_transform(op: str) -> None:
    """Refuse a transform of torch.func in traced code: it would lose tangents, and Dynamo can't trace what records a
    call. Dynamo traces this, so that it goes on without a graph where it may.
    """
    raise NotImplementedError(
        f"{op}: got a call under a transform of torch.func (grad, vjp, vmap, jvp) that torch.compile traces, expected "
        "one or the other; compile the function without the transform and call backward(), or use the transform in "
        "eager mode"
    )


def refuse_transformed(op: str, values: Iterable[Any]) -> None:
    """Refuse a call, under a transform of torch.func or forward-mode differentiation, with a tensor of that."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    refuse_tangents(op, tensors)
    # Fake tensors among others would end, at a level of forward mode, in an assertion that leaves autograd off.
    if any(map(_torch.is_wrapped, tensors)) or any(map(_torch.answers_for_itself, tensors)):
        raise NotImplementedError  # the front names the argument


def refuse_tangents(op: str, values: Iterable[Any]) -> None:
    """Refuse a call with a tensor that has a tangent."""
    if any(_torch.has_tangent(value) for value in values if isinstance(value, Tensor)):
        raise no_jvp(op)


def no_jvp(op: str) -> NotImplementedError:
    """Refuse forward-mode differentiation: a tangent would be lost without a word."""
    return NotImplementedError(
        f"{op}: got a call under forward-mode differentiation (torch.func.jvp, forward_ad), expected reverse mode: the "
        "op has no formula for tangents; use torch.func.vjp, torch.func.grad or backward()"
    )


def not_batched(op: str, argument: str, batched: Iterable[str]) -> ValueError:
    """Refuse a torch.func.vmap that can't be folded into the op's own batch."""
    return ValueError(
        f"{op}: {argument}: got a tensor that torch.func.vmap maps over, or an index of packed rows, expected only "
        f"{', '.join(batched)} to be mapped over: the op folds the mapped dimension into its batch; loop over the "
        "calls, or pass the batch to the op itself"
    )
