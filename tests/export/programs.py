"""What the tests of exported programs share: every op and layer as a module, with calls of several lengths."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from mamba_ops import export
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.registry import Op, Sample
from tests.harness import OPS
from tests.layers import HIDDEN, KINDS, new_layer

CPU = torch.device("cpu")
SIZES = ((2, 20), (3, 33), (1, 7), (5, 130), (2, 1))
"""Rows and tokens of a layer's calls; programs are exported at the first."""
ROWS = (13, 4, 7)
"""Rows of an op's calls; so are these."""
FLOAT32 = 1e-5
"""The most that a decomposed program differs: other orders of float32 sums. All else is bit-equal."""
STEPS = 3
"""Tokens of a row in a call of an op that advances states."""


class OpModule(nn.Module):
    """A call of an op; numbers stand in the program, tensors are its inputs."""

    def __init__(self, op: Op[...], sample: Sample) -> None:
        super().__init__()
        self.op = op
        arguments = bound(op, sample)
        self.numbers = {n: v for n, v in arguments.items() if not isinstance(v, Tensor)}

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.op(**tensors, **self.numbers)


class Program(NamedTuple):
    """A module, calls of it, and the dimensions in which they differ."""

    module: nn.Module
    calls: list[tuple[Any, ...]]
    dynamic: Any

    def export(self) -> torch.export.ExportedProgram:
        with torch.no_grad():
            return torch.export.export(self.module.eval(), self.calls[0], dynamic_shapes=self.dynamic)

    def largest_difference(self, run: Any) -> float:
        """Of all outputs, and of the tensors that a call changes, between eager calls and calls of `run`; relative to
        the largest number of a tensor, where that is more than 1.
        """
        worst = 0.0
        for call in self.calls:
            eager, other = copied(call), copied(call)
            with torch.no_grad():
                expected, got = self.module(*eager), run(*other)
            for one, two in zip(tensors_of((expected, eager)), tensors_of((got, other)), strict=True):
                assert one.shape == two.shape
                assert torch.isfinite(one).all()
                scale = max(float(one.double().abs().max()), 1.0)
                worst = max(worst, float((one.double() - two.double()).abs().max()) / scale)
        return worst


def bound(op: Op[...], sample: Sample) -> dict[str, Any]:
    arguments = op.bind(sample.args, sample.kwargs)
    return {n: v for n, v in arguments.items() if n != "output"}


class Returned(nn.Module):
    """A call of an op that also returns what it writes, and leaves its inputs as they are, as ONNX wants it."""

    def __init__(self, call: OpModule) -> None:
        super().__init__()
        self.call = call

    def forward(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        written = [name for name in tensors if name in self.call.op.mutates]
        tensors = tensors | {name: tensors[name].clone() for name in written}
        return [self.call(tensors), *(tensors[name] for name in written)]


class Cached(nn.Module):
    """A call of a layer, or a step, that takes its caches and returns them, so too."""

    def __init__(self, layer: Any, is_step: bool) -> None:
        super().__init__()
        self.layer, self.is_step = layer, is_step

    def forward(self, hidden: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        own = [cache.clone() for cache in caches]
        call = self.layer.step if self.is_step else self.layer
        return call(hidden, *own), *own


def op_program(op: Op[...], pattern: str, most: int | None = None) -> Program:
    """An op, called in one of its patterns with several numbers of rows and tokens, `most` of them at most."""
    samples = []
    for rows in ROWS:  # updates read as many tokens a row in every call
        tokens = STEPS if op.name.endswith("_update") else 2 * rows + 1
        random = RandomInputs(CPU, rows, tokens, slots=3 * rows + 2, dtype=torch.float32)
        samples.append(op.make_call(random, pattern))
    calls = [({n: v for n, v in bound(op, s).items() if isinstance(v, Tensor)},) for s in samples]
    dynamic: dict[str, Any] = {
        name: {i: Dim.DYNAMIC(max=most) for i, size in enumerate(v.shape) if size != calls[1][0][name].shape[i]}
        for name, v in calls[0][0].items()
    }
    return Program(OpModule(op, samples[0]), calls, (dynamic,))


def layer_program(kind: str, dtype: torch.dtype = torch.float32) -> Program:
    """A layer, called with several numbers of rows and tokens."""
    torch.manual_seed(0)
    layer = new_layer(kind, CPU).to(dtype)
    calls = [(torch.randn(rows, length, HIDDEN, dtype=dtype),) for rows, length in SIZES]
    return Program(layer, calls, ({0: Dim("rows", min=1, max=64), 1: Dim("length", min=1, max=512)},))


def cached_program(kind: str, is_step: bool) -> Program:
    """A layer that reads prompts into caches, or steps."""
    layer = layer_program(kind).module
    calls = []
    for rows, length in SIZES:
        caches = [torch.randn_like(c) for c in layer.empty_caches(rows)]
        calls.append((torch.randn(rows, HIDDEN) if is_step else torch.randn(rows, length, HIDDEN), *caches))
    rows_of, length_of = {0: Dim("rows", min=1, max=64)}, {} if is_step else {1: Dim("length", min=1, max=512)}
    return Program(Cached(layer, is_step), calls, (rows_of | length_of, (rows_of,) * len(layer.Caches._fields)))


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program of core ATen, and of torch.export's own assertions, which is asserted."""
    plain = program.run_decompositions(export.decompositions())
    called = {node.target for node in plain.graph.nodes if node.op == "call_function"}
    ops = {op for op in called if isinstance(op, torch._ops.OpOverload) and "_assert" not in op.name()}
    assert ops
    assert not [op for op in ops if torch.Tag.core not in op.tags]
    return plain


def op_cases() -> Iterator[tuple[Op[...], str]]:
    for op in OPS:
        for pattern in op.patterns:
            yield op, pattern


LAYERS = tuple(KINDS)


def copied(values: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.clone(), values)


def tensors_of(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]
