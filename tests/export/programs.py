"""What the tests of exported programs share: every op and layer as a module, with calls of several lengths."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_ops import export
from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.registry import Op, Sample
from tests.harness import OPS
from tests.layers import HIDDEN, KINDS, new_layer

CPU = torch.device("cpu")
LENGTHS = (20, 33, 7, 130, 2)
"""Tokens of a layer's calls; programs are exported at the first."""
ROWS = (13, 4, 7)
"""Rows of an op's calls; so are these."""
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


def op_program(op: Op[...], pattern: str) -> Program:
    """An op, called in one of its patterns with several numbers of rows and tokens."""
    samples = []
    for rows in ROWS:  # updates read as many tokens a row in every call
        tokens = STEPS if op.name.endswith("_update") else 2 * rows + 1
        random = RandomInputs(CPU, rows, tokens, slots=3 * rows + 2, dtype=torch.float32)
        samples.append(op.make_call(random, pattern))
    calls = [({n: v for n, v in bound(op, s).items() if isinstance(v, Tensor)},) for s in samples]
    dynamic: dict[str, Any] = {
        name: {i: torch.export.Dim.DYNAMIC for i, size in enumerate(v.shape) if size != calls[1][0][name].shape[i]}
        for name, v in calls[0][0].items()
    }
    return Program(OpModule(op, samples[0]), calls, (dynamic,))


def layer_program(kind: str, dtype: torch.dtype = torch.float32) -> Program:
    """A layer, called with several lengths."""
    torch.manual_seed(0)
    layer = new_layer(kind, CPU).to(dtype)
    calls = [(torch.randn(2, length, HIDDEN, dtype=dtype),) for length in LENGTHS]
    return Program(layer, calls, ({1: torch.export.Dim("length", min=1, max=512)},))


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without an op of this package, which is asserted."""
    plain = program.run_decompositions(export.decompositions())
    called = {str(node.target) for node in plain.graph.nodes if node.op == "call_function"}
    assert called
    assert not [name for name in called if "mamba_ops" in name], called
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
