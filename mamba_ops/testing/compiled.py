"""What a compiled call of an op must be: one graph, for all sizes, with the bits of the eager call and no copies."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mamba_ops.ops._common.random_inputs import RandomInputs
from mamba_ops.registry import Op, Sample, use_backend
from mamba_ops.testing.judge import Front, assert_same_bits, run, with_output

BATCHES = (13, 2, 3, 4, 7, 8, 9, 16, 17)
"""Numbers of batch rows. The first makes a call in which all sizes differ, as equal ones would share a symbol."""


@contextmanager
def counting_graphs() -> Iterator[Callable[[], int]]:
    """Forget all compiled code, before and after the block; in it the function given counts the graphs compiled."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    try:
        yield lambda: int(counters["stats"]["unique_graphs"]) - before
    finally:
        torch._dynamo.reset()


def plain_call(op: Op[...]) -> Front:
    """Return a function that calls the op, for torch.compile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call


def pattern_call(
    op: Op[...], pattern: str, rows: int, device: torch.device, sizes: Mapping[str, int] | None = None
) -> Sample:
    """Return a call of one of the op's patterns in which no size that grows agrees with another one: with 13 rows, up
    to 27 tokens each and 41 slots.
    """
    length, slots = 2 * rows + 1, 3 * rows + 2
    return op.make_call(RandomInputs(device, rows, length, slots=slots, sizes=sizes, dtype=torch.float32), pattern)


def opcheck(op: Op[...], sample: Sample) -> None:
    """Run `torch.library.opcheck` on a call: schema, autograd registration, fake, AOT dispatch."""
    if op.returns:
        arguments = op.bind(sample.clone().args, sample.kwargs)
        inputs = [arguments[p.name] for p in op.parameters if p.name not in op.returns]
        with torch.set_grad_enabled(op.record is not None):  # whether it is registered with autograd
            if torch.is_grad_enabled():
                inputs = [v.requires_grad_() if _is_float(v) else v for v in inputs]
            torch.library.opcheck(op.overload, tuple(inputs))
        return
    filled = with_output(op, sample)
    arguments = op.bind(filled.args, filled.kwargs)
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    arguments |= {name: torch.empty(0, device=device) for name in op.mutates if arguments[name] is None}
    positional = [arguments.pop(p.name) for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    torch.library.opcheck(op.overload, tuple(positional), arguments)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def assert_compiled_equals_eager(op: Op[...], sample: Sample, backends: Iterable[str]) -> None:
    """Compiled, a call leaves the bits that it leaves eagerly, on one backend after the other in one graph."""
    with counting_graphs() as graphs:
        compiled = torch.compile(plain_call(op), fullgraph=True)
        sample = with_output(op, sample)
        for backend in backends:
            eager, other = sample.clone(), sample.clone()
            with use_backend(backend):
                expected, got = run(op, op, eager), run(op, compiled, other)
            for name, tensor in expected.items():
                assert_same_bits(f"{name}, compiled on {backend}", got[name], tensor)
        assert graphs() == 1, f"got {graphs()} graphs, expected 1"


def assert_one_graph_for_all_sizes(
    op: Op[...],
    pattern: str,
    device: torch.device,
    batches: Collection[int] = BATCHES,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Under `dynamic=True` batches of 2 rows and more share a graph, 1 and 0 may have their own; bits are as eager."""
    with counting_graphs() as graphs:
        compiled = torch.compile(plain_call(op), fullgraph=True, dynamic=True)

        def call(rows: int, allowed: int) -> None:
            eager = pattern_call(op, pattern, rows, device, sizes)
            other = eager.clone()
            expected, got = op(*eager.args, **eager.kwargs), compiled(*other.args, **other.kwargs)
            assert_same_bits(f"{rows} rows: output", got, expected)
            for name in op.mutates - {"output", *op.returns}:
                pair = (op.bind(sample.args, sample.kwargs)[name] for sample in (other, eager))
                assert_same_bits(f"{rows} rows: {name}", *pair)
            assert graphs() <= allowed, f"{rows} rows: got graph number {graphs()}, expected {allowed} at most"

        for rows in batches:
            call(rows, 1)
        call(1, 2)
        call(0, 3)


def assert_no_copies(op: Op[...], compiled: Front, sample: Sample) -> None:
    """Inductor's code for a call allocates what the caller left out, calls the op once, and does nothing else."""
    from torch._inductor.utils import run_and_get_code

    arguments = op.bind(sample.args, sample.kwargs)
    left_out = [name for name in op.mutates - {"output"} if arguments[name] is None]
    left_out += ["out"] * ("output" in op.mutates and sample.kwargs.get("out") is None)
    with torch._inductor.config.patch(fx_graph_cache=False):  # code from the cache is not written again
        _, [code] = run_and_get_code(compiled, *sample.args, **sample.kwargs)
    called = code[code.index("def call(") :]
    runs = called.count(f"torch.ops.{op.namespace}.{op.name}.default(")
    assert runs == 1, f"got {runs} calls of the op in Inductor's code, expected 1:\n{called}"
    allocated = called.count(" = empty_strided")
    assert allocated <= len(left_out), (
        f"got {allocated} new tensors in Inductor's code, expected {len(left_out)} "
        f"({', '.join(left_out) or 'none was left out'}):\n{called}"
    )
    words = [w for w in ("copy_(", "clone(", "kernels.", "_fused_") if w in called]
    assert not words, f"got {', '.join(words)} in Inductor's code, expected the op alone:\n{called}"
