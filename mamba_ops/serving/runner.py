"""Runs a model on an engine's steps: compiled in pieces, padded to a few sizes, replayed from the device's graphs."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import device_or_none, whole_number
from mamba_ops.ops._common.sequences import NULL_SLOT, PlanTensors
from mamba_ops.registry import generation
from mamba_ops.registry.errors import in_call_of
from mamba_ops.serving.capture import Graphs, graphs_of
from mamba_ops.serving.context import ForwardContext, forward_context
from mamba_ops.serving.piecewise import CompilePiece, PiecewiseBackend, Recording
from mamba_ops.serving.plan import Plan

CAPTURE_SIZES = (1, 2, 4, *range(8, 257, 8))


class PiecewiseRunner:
    """Runs `model(*inputs, plan)` for one plan after the other, with few launches on a device that has graphs.

    The tokens of a step are padded to the next capture size. A step in which all requests decode one token is replayed
    as one graph, the mixing ops inside. Any other step runs piecewise: the pieces between splitting ops are replayed,
    the ops themselves launched. A step of more tokens than the largest size runs compiled, without graphs. A size's
    first step runs as compiled, the second records, later ones replay. After a swap of the backend all sizes are
    recorded again. On a device without graphs the same steps run, with the same padding, and nothing is recorded.

    A runner is for one thread. A result is valid until the next step.

    Attributes:
        backend: the backend of torch.compile for the model.
        compiled: the compiled model, which takes inputs of a capture size and a plan; `backend` splits it.
        steps: how many steps ran "full", "piecewise" and "plain" (more tokens than any size).
        recorded: how many graphs of the device were recorded.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        *,
        max_tokens: int,
        max_requests: int,
        capture_sizes: Sequence[int] = CAPTURE_SIZES,
        columns: int = 1,
        speculative: bool = False,
        shared: bool = False,
        rounds: int = 1,
        null_slot: int = NULL_SLOT,
        device: torch.device | str = "cpu",
        context: ForwardContext | None = None,
        compile_piece: str | CompilePiece = "inductor",
        full_graphs: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        """Compile nothing yet.

        Args:
            model: takes tensors with the step's tokens as first axis, then the plan, and returns one such tensor. It
                is traced once (once more for a single token), so it may read the plan's tensors, and caches that keep
                their addresses.
            max_tokens: the most tokens of a step.
            max_requests: the most requests of a plan, as given to `Plan.of`.
            capture_sizes: numbers of tokens to record graphs for; those above max_tokens are left out.
            columns, speculative, shared, rounds, null_slot: as for the plans, see `Plan.zeros`.
            device: where the model is.
            context: the forward context of a model with ops by layer name; it gets each step's plan. The model is
                then called as `model(*inputs)`.
            compile_piece: the backend of torch.compile for the pieces.
            full_graphs: whether steps that only decode run as one graph; False where a kernel cannot be captured.
            graphs: records and replays; None: the device's own graphs, if it has any.

        Raises:
            ValueError: the model cannot be called, a number is none or too small, there is no such device.
        """
        _check_made_of(model, max_tokens, max_requests, capture_sizes, columns, rounds, device)
        sizes = sorted({size for size in capture_sizes if size <= max_tokens})
        if not sizes or sizes[0] < 1:
            expected = f"at least one from 1 to max_tokens={max_tokens}"
            raise ValueError(f"PiecewiseRunner: capture_sizes: got {list(capture_sizes)}, expected {expected}")
        self.device = torch.device(device)
        self.backend = PiecewiseBackend(compile_piece)
        self.capture_sizes, self.max_tokens, self.max_requests = sizes, max_tokens, max_requests
        self.steps: Counter[str] = Counter()
        self.recorded = 0
        self._columns, self._speculative, self._shared, self._null_slot = columns, speculative, shared, null_slot
        self._plan_of = partial(
            Plan.of, rounds=rounds, max_requests=max_requests, null_slot=null_slot, device=self.device
        )
        self._zeros = partial(
            Plan.zeros,
            columns=columns,
            speculative=speculative,
            shared=shared,
            rounds=rounds,
            max_requests=max_requests,
            null_slot=null_slot,
            device=self.device,
        )
        self._graphs = graphs_of(self.device) if graphs is None else graphs
        self._context, self._full_graphs = context, full_graphs
        self.compiled = torch.compile(_entry_of(model), backend=self.backend, fullgraph=True, dynamic=False)
        self._plan = self._zeros(0).tensors  # graphs read a step's plan here
        self._counts = {size: torch.tensor([size, size] + [0] * 2 * rounds) for size in sizes}
        self._buffers: list[Tensor] = []
        self._views: dict[int, list[Tensor]] = {}
        self._forget()

    def __call__(self, plan: Plan, *inputs: Tensor) -> Tensor:
        """Run a step and return the model's output for its tokens.

        Args:
            plan: of this step.
            inputs: each of `plan.tokens` entries, in the plan's order; on the runner's device, or on the CPU.

        Raises:
            ValueError: before anything is written: the inputs are not the plan's tokens, there are too many, or the
                plan is made for another number of requests.
        """
        counts, is_first = self._checked(plan, inputs), not self._buffers
        try:
            return self._step(plan, counts, inputs)
        except Exception:
            if is_first:  # inputs that the model does not take say nothing about later ones
                self._buffers, self._views = [], {}
            raise

    def _step(self, plan: Plan, counts: list[int], inputs: Sequence[Tensor]) -> Tensor:
        if generation() != self._generation:
            self._forget()
        size = next((size for size in self.capture_sizes if size >= plan.tokens), None)
        with torch.no_grad():
            if size is None:
                self.steps["plain"] += 1
                return self._run(plan, self._staged(inputs, plan.tokens))
            views = self._staged(inputs, size)
            for kept, given in zip(self._plan[1:], plan.tensors[1:], strict=True):
                if kept is not None and given is not None:
                    kept.copy_(given, non_blocking=True)
            staged = Plan(self._plan._replace(counts=plan.tensors.counts), size, null_slot=plan.null_slot)
            if self._is_full(size) and counts[:2] == [plan.tokens] * 2 and not any(counts[2:]):
                self.steps["full"] += 1
                return self._full(staged, size, views)[: plan.tokens]
            self.steps["piecewise"] += 1
            return self._piecewise(staged, size, views)[: plan.tokens]

    def prepare(self, *examples: Tensor) -> None:
        """Compile the model and record every graph that any step may replay, with steps of padding tokens.

        Args:
            examples: tensors like the inputs, of any number of tokens.
        """
        for size in reversed(self.capture_sizes):
            inputs = [example.new_zeros(size, *example.shape[1:]) for example in examples]
            plans = [self._zeros(size)]
            if self._is_full(size):
                rows = ([1] * size, [1] * size, [[NULL_SLOT] * self._columns] * size)
                plans.append(self._plan_of(*rows, sources=[None] * size if self._shared else None))
            for plan in plans:
                for _ in range(2):  # the first runs, the second records
                    self(plan, *inputs)
        self.steps.clear()

    def _is_full(self, size: int) -> bool:
        """Whether steps of so many decodes, and nothing else, are one graph."""
        return self._full_graphs and size <= self.max_requests and not self._speculative

    # -- one step -----------------------------------------------------------------------------------------------------

    def _checked(self, plan: Plan, inputs: Sequence[Tensor]) -> list[int]:
        """Return the plan's counts, or raise the ValueError about a plan or inputs that do not fit."""
        if not isinstance(plan, Plan):
            raise _wrong("plan", f"a {type(plan).__name__}", "a mamba_ops.serving.Plan")
        tensors = plan.tensors
        if tensors.counts is None or tensors.cu_seqlens is None:
            raise _wrong("plan", "no plan", "a Plan; for a profile run there is Plan.zeros(tokens)")
        if (rows := tensors.cu_seqlens.shape[0] - 1) != self.max_requests:
            raise _wrong(
                "plan", f"a plan with max_requests={rows}", f"max_requests={self.max_requests}, as the runner has"
            )
        if plan.null_slot != self._null_slot:
            raise _wrong("plan", f"null_slot {plan.null_slot}", f"{self._null_slot}, as the runner has")
        if plan.tokens > self.max_tokens:
            raise _wrong(
                "plan", f"{plan.tokens} tokens", f"at most max_tokens={self.max_tokens}; read prompts in chunks"
            )
        if (got := _shapes(tensors)) != (expected := _shapes(self._plan)):
            raise _wrong("plan", f"tensors of shapes {got}", f"{expected}; see columns, speculative, shared and rounds")
        for name, given, kept in zip(PlanTensors._fields, tensors, self._plan, strict=True):
            if given is None or kept is None:
                continue
            if given.dtype != kept.dtype or given.device.type not in (kept.device.type, "cpu"):
                there, here = (f"{name} of {t.dtype} on {t.device}" for t in (given, kept))
                raise _wrong("plan", there, f"{here}, as Plan.of makes it")
        for tensor in inputs:
            if not isinstance(tensor, Tensor) or not tensor.dim():
                raise _wrong("inputs", f"a {type(tensor).__name__}", "tensors with the step's tokens as first axis")
            if tensor.device.type not in (self.device.type, "cpu") or tensor.layout != torch.strided:
                kind = f"a tensor of {tensor.layout} on {tensor.device}"
                raise _wrong("inputs", kind, f"a strided one on {self.device}, as the runner's device is, or on cpu")
            if tensor.shape[0] != plan.tokens:
                raise _wrong("inputs", f"{tensor.shape[0]} tokens", f"{plan.tokens}, as the plan has")
        kinds, first = ([(t.dtype, tuple(t.shape[1:])) for t in ts] for ts in (inputs, self._buffers))
        if self._buffers and kinds != first:
            raise _wrong("inputs", f"{kinds} a token", f"{first}, as in the first step")
        counts = [int(n) for n in tensors.counts.tolist()]
        if (counted := sum(counts[1::2])) > plan.tokens:
            raise _wrong("plan", f"counts of {counted} tokens", f"{plan.tokens}, as it says itself")
        return counts

    def _run(self, plan: Plan, views: Sequence[Tensor]) -> Tensor:
        """Call the compiled model."""
        if self._context is None:
            return self.compiled(*views, plan)
        with forward_context(replace(self._context, plan=plan)):
            return self.compiled(*views)

    def _piecewise(self, plan: Plan, size: int, views: Sequence[Tensor]) -> Tensor:
        if self._graphs is None or ("piecewise", size) not in self._warm:
            output = self._run(plan, views)
            self._warm.add(("piecewise", size))
            return output
        recording = self._recordings.setdefault(size, Recording(self._graphs))
        self.backend.recording = recording
        try:
            output = self._run(plan, views)
        except BaseException:
            if not recording.complete:
                del self._recordings[size]  # a step is recorded as a whole, or not at all
            raise
        finally:
            self.backend.recording = None
        if not recording.complete:
            recording.complete = True
            self.recorded += len(recording)
        return output

    def _full(self, plan: Plan, size: int, views: Sequence[Tensor]) -> Tensor:
        # Its counts are `size` decodes; those beyond the plan's are padding, as are all rows of a plan after its last.
        plan = replace(plan, tensors=plan.tensors._replace(counts=self._counts[size]))
        if self._graphs is None or ("full", size) not in self._warm:
            output = self._run(plan, views)
            self._warm.add(("full", size))
            return output
        if size not in self._fulls:
            self._fulls[size] = self._graphs.record(lambda: self._run(plan, views))
            self.recorded += 1
        output, replay = self._fulls[size]
        replay()
        return output

    def _staged(self, inputs: Sequence[Tensor], size: int) -> list[Tensor]:
        """Copy inputs to where graphs read them, padded with zeros."""
        if not self._buffers:
            self._buffers = [
                torch.zeros(self.max_tokens, *t.shape[1:], dtype=t.dtype, device=self.device) for t in inputs
            ]
        views = self._views.get(size)
        if views is None:
            views = [buffer[:size] for buffer in self._buffers]
            if size > 1:  # to torch.compile a size of 1 is a constant
                for view in views:
                    torch._dynamo.mark_dynamic(view, 0)
            if size in self._counts:
                self._views[size] = views
        for view, given in zip(views, inputs, strict=True):
            view[: given.shape[0]].copy_(given, non_blocking=True)
            view[given.shape[0] :].zero_()
        return views

    def _forget(self) -> None:
        """Drop all recordings, because they hold the kernels that were selected before."""
        self._generation = generation()
        self._warm: set[tuple[str, int]] = set()  # steps that ran, so that recording them compiles nothing
        self._recordings: dict[int, Recording] = {}
        self._fulls: dict[int, tuple[Tensor, Callable[[], None]]] = {}


def _shapes(plan: PlanTensors) -> list[tuple[int, ...] | None]:
    return [None if tensor is None else tuple(tensor.shape) for tensor in plan]


def _wrong(name: str, got: str, expected: str) -> ValueError:
    return ValueError(f"PiecewiseRunner: {name}: got {got}, expected {expected}")


def _check_made_of(
    model: Any, max_tokens: Any, max_requests: Any, capture_sizes: Any, columns: Any, rounds: Any, device: Any
) -> None:
    """Raise the ValueError about what a runner cannot be made of."""
    if not callable(model):
        raise _wrong("model", f"a {type(model).__name__}", "a module or a function")
    if isinstance(capture_sizes, str) or not hasattr(capture_sizes, "__iter__"):
        raise _wrong("capture_sizes", repr(capture_sizes), "a sequence of whole numbers")
    numbers = [("max_tokens", max_tokens), ("max_requests", max_requests), ("columns", columns), ("rounds", rounds)]
    try:
        for name, number in (*numbers, *(("capture_sizes", size) for size in capture_sizes)):
            whole_number(name, number, least=1 if name in ("max_tokens", "columns", "rounds") else 0)
        device_or_none("device", device)
    except ValueError as error:
        raise in_call_of("PiecewiseRunner", error) from None


def _entry_of(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that calls the model and has code of its own.

    torch.compile counts recompiles by code object. Runners over models of one class would share the class's limit.
    """

    def entry(*inputs: Any) -> Tensor:
        return model(*inputs)

    return FunctionType(entry.__code__.replace(), entry.__globals__, "entry", None, entry.__closure__)
