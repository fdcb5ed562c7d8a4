"""Every op under torch.compile: opcheck, eager = compiled, one graph, one graph for all sizes, no copy of a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mamba_ops
from mamba_ops.registry import Op, Sample, use_backend
from mamba_ops.testing import compiled
from mamba_ops.testing.judge import front_on, refusal, results, with_output
from tests.conftest import ACCELERATOR
from tests.harness import OPS, PARTIAL, SIZES, backends_here, cases, long_interpreted, samples_for

DEVICE = ACCELERATOR or torch.device("cpu")
SAMPLES = [pytest.param(op, sample, id=f"{op.name}-{sample}") for op in OPS for sample in op.make_samples(DEVICE)]


def long(op: Op[...], sample: Sample) -> bool:
    return long_interpreted(op, "triton", sample)


SAMPLES += [  # in the sizes of backends that take none of those
    pytest.param(op, sample, id=f"{op.name}-{backend}'s {sample}")
    for op in OPS
    for backend in backends_here(op, DEVICE)
    if (backend, op.name) in SIZES
    for sample in samples_for(op, backend, DEVICE)
]

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "no_grad")


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("op", "backend", "sample"), cases(DEVICE, slow=long_interpreted))
def test_opcheck(op: Op[...], backend: str, sample: Sample) -> None:
    with use_backend(backend):
        compiled.opcheck(op, sample)


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_compiled_equals_eager_in_one_graph(op: Op[...], sample: Sample) -> None:
    """Bit for bit."""
    compiled.assert_compiled_equals_eager(op, sample, ["torch"])


@pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(*p.values, id=p.id, marks=pytest.mark.slow if long(*p.values) else ()) for p in SAMPLES],
)
def test_swaps_of_all_backends_keep_the_graph_and_the_bits(op: Op[...], sample: Sample) -> None:
    takes_all = {n for n in backends_here(op, DEVICE) if (n, op.name) not in SIZES and n not in PARTIAL}
    here = [n for n in backends_here(op, DEVICE) if n in takes_all or refusal(op, n, sample) is None]
    compiled.assert_compiled_equals_eager(op, sample, [*here, "torch"])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiled_with_transposed_x_and_strided_output(op: Op[...]) -> None:
    """Where `out=` is not contiguous Dynamo breaks graphs for ops that call it `out`."""
    sample = with_output(op, op.make_samples(DEVICE)[0])
    tokens = sample.kwargs["out"].shape[0]

    def transposed(t: Tensor) -> Tensor:
        return t.movedim(0, -1).contiguous().movedim(-1, 0)

    def is_activation(a: Any) -> bool:
        return isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1 and a.shape[0] == tokens

    args = tuple(transposed(a) if is_activation(a) else a for a in sample.args)
    assert any(new.stride() != a.stride() for new, a in zip(args, sample.args, strict=True) if is_activation(a))
    strided = Sample("strided", args, {**sample.kwargs, "out": transposed(sample.kwargs["out"])})
    eager, other = sample.clone(), strided.clone()
    op(*eager.args, **eager.kwargs)
    torch.compile(compiled.plain_call(op), fullgraph=True)(*other.args, **other.kwargs)
    for name, expected in results(op, eager).items():
        assert torch.equal(results(op, other)[name], expected)
    assert graphs() == 1


def step(op: Op[...], pattern: str, rows: int) -> Sample:
    return compiled.pattern_call(op, pattern, rows, DEVICE)


def whole_patterns(op: Op[...]) -> list[str]:
    """The patterns that pass most of the caches which the op mutates; scales belong to narrow states alone."""
    counts = {}
    for pattern in op.patterns:
        sample = step(op, pattern, 2)
        arguments = op.bind(sample.args, sample.kwargs)
        counts[pattern] = sum(arguments[name] is not None for name in op.mutates)
    return [pattern for pattern, count in counts.items() if count == max(counts.values())]


STEPS = [
    pytest.param(op, pattern, id=f"{op.name}-{pattern}", marks=pytest.mark.slow if number else ())
    for op in OPS
    for number, pattern in enumerate(whole_patterns(op))
]

DAILY_STEPS: dict[Op[...], str] = {case.values[0]: case.values[1] for case in reversed(STEPS)}
"""Each op's first such pattern."""


def test_every_op_has_a_pattern_with_all_that_it_mutates() -> None:
    assert list(dict.fromkeys(p.values[0] for p in STEPS)) == OPS
    for op, pattern in (case.values for case in STEPS):
        sample = step(op, pattern, 2)
        arguments = op.bind(sample.args, sample.kwargs)
        assert {name for name in op.mutates if arguments[name] is None} <= {"state_scale"}, (op, pattern)


# All of them where they are quick; else 2 to 4, and those beside powers of two.
SIZES_OF_A_GRAPH = [n for n in range(2, 65) if ACCELERATOR or n < 5 or {n - 1, n, n + 1} & {8, 16, 32, 64}]


@pytest.mark.parametrize(("op", "pattern"), STEPS)
def test_one_graph_for_all_sizes(op: Op[...], pattern: str) -> None:
    compiled.assert_one_graph_for_all_sizes(op, pattern, DEVICE, (13, *SIZES_OF_A_GRAPH))


def _whole(cache: Tensor) -> Tensor:
    return cache


def _padded(cache: Tensor) -> Tensor:
    pages = cache.new_zeros(cache.shape[0], cache[0].numel() + 7)
    return pages.as_strided(cache.shape, (pages.stride(0), *cache[0].contiguous().stride())).copy_(cache)


def _sliced(cache: Tensor) -> Tensor:
    return torch.cat([cache, cache, cache])[2 : 2 + cache.shape[0]]


def _transposed(cache: Tensor) -> Tensor:
    return cache.transpose(-1, -2).contiguous().transpose(-1, -2)


EVERY_DAY = {(True, None), (False, "slice"), (True, "transpose")}  # and the last two of a whole cache alone
PLACES = [
    pytest.param(dynamic, inside, layout, marks=() if every_day else pytest.mark.slow)
    for dynamic in (False, True)
    for inside in (None, "slice", "transpose")
    for layout in (_whole, _padded, _sliced, _transposed)
    for every_day in [(dynamic, inside) in EVERY_DAY and (inside is None or layout is _whole)]
]


@pytest.mark.parametrize(("dynamic", "inside", "layout"), PLACES)
@pytest.mark.parametrize(("op", "pattern"), [case for case in STEPS if case.values[0] is not mamba_ops.rms_norm])
def test_no_copy_of_a_cache(op: Op[...], pattern: str, layout: Any, inside: str | None, dynamic: bool) -> None:
    """Read from Inductor's code: nothing is allocated but the output, and nothing is copied.

    The cache comes in as a whole, padded, sliced or transposed tensor; or the graph takes such a view of it itself.
    """
    sample = step(op, pattern, 13)
    arguments = op.bind(sample.args, sample.kwargs)
    tokens = arguments.pop("output").shape[0]
    # What is mutated and has the tokens' axes is another output.
    mutated = [name for name in op.mutates - {"output"} if arguments[name] is not None]
    caches = [name for name in mutated if arguments[name].shape[0] != tokens]
    assert caches
    for name in caches:
        arguments[name] = layout(arguments[name])
        if inside == "transpose":
            arguments[name] = arguments[name].transpose(-1, -2).contiguous()
    views = {None: lambda c: c, "slice": lambda c: c[1:], "transpose": lambda c: c.transpose(-1, -2)}

    def call(**arguments: Any) -> Tensor:
        return op(**{name: views[inside](a) if name in caches else a for name, a in arguments.items()})

    compiled.assert_no_copies(op, torch.compile(call, fullgraph=True, dynamic=dynamic), Sample(pattern, (), arguments))


def test_a_layer_of_both_ops_is_one_graph() -> None:
    """Two ops and torch around them: one graph, one copy of nothing, for many batches."""

    def layer(x: Tensor, cache: Tensor, weight: Tensor, bias: Tensor, *ssm_args: Tensor, slots: Tensor) -> Tensor:
        x = mamba_ops.causal_conv1d_update(x, cache, weight, bias, slots=slots) * 2
        state, _, dt, A, B, C = ssm_args
        heads, dim = state.shape[1:3]
        u = x[:, :1].unsqueeze(1).expand(-1, heads, dim)
        return mamba_ops.selective_state_update(state, u, dt, A, B, C, slots=slots, dt_softplus=True).sin()

    in_one = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (13, 4, 9):
        steps = [
            step(op, "one token", rows) for op in (mamba_ops.causal_conv1d_update, mamba_ops.selective_state_update)
        ]
        runs = [[sample.clone() for sample in steps] for _ in range(2)]
        outs = [f(*c.args, *s.args, slots=c.kwargs["slots"]) for f, (c, s) in zip((layer, in_one), runs, strict=True)]
        torch.testing.assert_close(*outs)
    assert graphs() == 1


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_exports_without_a_token(op: Op[...]) -> None:
    sample = with_output(op, op.make_samples(DEVICE)[0])

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
            return op(*args, **kwargs)

    program = torch.export.export(Module(), sample.args, dict(sample.kwargs))
    [node] = [n for n in program.graph.nodes if n.target is op.overload]
    assert node.kwargs.get("selection") is None
    eager, other = sample.clone(), sample.clone()
    front_on(op, "torch")(*eager.args, **eager.kwargs)
    with use_backend("torch"):
        program.module()(*other.args, **other.kwargs)
    assert torch.equal(results(op, eager)["output"], results(op, other)["output"])
