"""Every op under torch.compile: opcheck, eager = compiled, one graph, one graph for all sizes, no copy of a cache."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import mamba_ops
from mamba_ops.registry import Op, Sample, use_backend
from mamba_ops.serving import Plan
from tests.conftest import ACCELERATOR
from tests.harness import (
    OPS,
    SIZES,
    backends_here,
    cases,
    front_on,
    long_interpreted,
    refusal,
    results,
    samples_for,
    with_output,
)

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


def the_call(op: Op[...]) -> Callable[..., Tensor]:
    """A function of its own for each test: Dynamo keeps what it compiled by code object."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return op(*args, **kwargs)

    return call


@pytest.mark.parametrize(("op", "backend", "sample"), cases(DEVICE, slow=long_interpreted))
def test_opcheck(op: Op[...], backend: str, sample: Sample) -> None:
    arguments = op.bind(*(lambda s: (s.args, s.kwargs))(with_output(op, sample)))
    arguments |= {name: torch.empty(0, device=DEVICE) for name in op.mutates if arguments[name] is None}
    positional = [arguments.pop(p.name) for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    with use_backend(backend):
        torch.library.opcheck(op.overload, tuple(positional), arguments)


def equals_eager(op: Op[...], sample: Sample, backends: Sequence[str]) -> None:
    compiled = torch.compile(the_call(op), fullgraph=True)
    sample = with_output(op, sample)
    for backend in backends:
        eager, other = sample.clone(), sample.clone()
        with use_backend(backend):
            op(*eager.args, **eager.kwargs)
            compiled(*other.args, **other.kwargs)
        for name, expected in results(op, eager).items():
            assert torch.equal(results(op, other)[name], expected), f"{backend}: {name}"
    assert graphs() == 1


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_compiled_equals_eager_in_one_graph(op: Op[...], sample: Sample) -> None:
    """Bit for bit."""
    equals_eager(op, sample, ["torch"])


@pytest.mark.parametrize(
    ("op", "sample"),
    [pytest.param(*p.values, id=p.id, marks=pytest.mark.slow if long(*p.values) else ()) for p in SAMPLES],
)
def test_swaps_of_all_backends_keep_the_graph_and_the_bits(op: Op[...], sample: Sample) -> None:
    here = [n for n in backends_here(op, DEVICE) if (n, op.name) not in SIZES or refusal(op, n, sample) is None]
    equals_eager(op, sample, [*here, "torch"])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_compiled_with_transposed_x_and_strided_output(op: Op[...]) -> None:
    """Where `out=` is not contiguous Dynamo breaks graphs for ops that call it `out`."""
    sample = with_output(op, op.make_samples(DEVICE)[0])
    arguments = op.bind(sample.args, sample.kwargs)
    for name, p in zip(arguments, op.parameters, strict=False):
        assert name == p.name or "output" in (name, p.name)

    def transposed(t: Tensor) -> Tensor:
        return t.movedim(0, -1).contiguous().movedim(-1, 0)

    x = next(arguments[name] for name in ("x", "u", "v", "projected", "projected_qkvz") if name in arguments)
    args = tuple(transposed(a) if a is x else a for a in sample.args)
    strided = Sample("strided", args, {**sample.kwargs, "out": transposed(sample.kwargs["out"])})
    eager, other = sample.clone(), strided.clone()
    op(*eager.args, **eager.kwargs)
    torch.compile(the_call(op), fullgraph=True)(*other.args, **other.kwargs)
    for name, expected in results(op, eager).items():
        assert torch.equal(results(op, other)[name], expected)
    assert graphs() == 1


def conv_step(rows: int) -> Sample:
    dim, width, slots = 24, 4, 3 * rows + 2
    x, weight = torch.randn(rows, dim, device=DEVICE), torch.randn(dim, width, device=DEVICE)
    cache = torch.randn(slots, width - 1, dim, device=DEVICE).transpose(1, 2)
    return Sample("step", (x, cache, weight), {"slots": torch.arange(rows, device=DEVICE) + 1})


def conv_prefill(rows: int) -> Sample:
    dim, width, slots, length = 24, 4, 3 * rows + 2, 2 * rows + 1
    x, weight = torch.randn(rows, length, dim, device=DEVICE), torch.randn(dim, width, device=DEVICE)
    cache = torch.randn(slots, width - 1, dim, device=DEVICE).transpose(1, 2)
    known = torch.arange(rows, device=DEVICE) % 2 == 0
    places = torch.arange(rows, device=DEVICE) + 1
    return Sample("step", (x, weight), {"conv_state": cache, "slots": places, "has_initial_state": known})


def ssm_step(rows: int) -> Sample:
    heads, dim, dstate, groups, slots = 4, 8, 16, 2, 3 * rows + 2  # 17 at first: no two sizes agree
    x, dt = torch.randn(rows, heads, dim, device=DEVICE), torch.rand(rows, heads, device=DEVICE)
    B, C = (torch.randn(rows, groups, dstate, device=DEVICE) for _ in range(2))
    state, A = torch.randn(slots, heads, dim, dstate, device=DEVICE), -torch.rand(heads, device=DEVICE)
    return Sample("step", (state, x, dt, A, B, C), {"slots": torch.arange(rows, device=DEVICE) + 1, "D": -A})


def scan_step(rows: int) -> Sample:
    heads, dim, dstate, groups, length, slots = 4, 8, 16, 2, 7, 3 * rows + 2
    x, dt = torch.randn(rows, length, heads, dim, device=DEVICE), torch.rand(rows, length, heads, device=DEVICE)
    B, C = (torch.randn(rows, length, groups, dstate, device=DEVICE) for _ in range(2))
    state, A = torch.randn(slots, heads, dim, dstate, device=DEVICE), -torch.rand(heads, device=DEVICE)
    kept = torch.randn(3 * rows + 3, heads, dim, dstate, device=DEVICE)
    kwargs = {"D": A, "ssm_state": state, "slots": torch.arange(rows, device=DEVICE) + 1, "chunk_states": kept}
    return Sample("step", (x, dt, A, B, C, 4), kwargs)


def selective_scan_step(rows: int) -> Sample:
    dim, dstate, groups, length, slots = 24, 16, 2, 7, 3 * rows + 2
    u, delta = torch.randn(rows, length, dim, device=DEVICE), torch.rand(rows, length, dim, device=DEVICE)
    B, C = (torch.randn(rows, length, groups, dstate, device=DEVICE) for _ in range(2))
    state, A = torch.randn(slots, dim, dstate, device=DEVICE), -torch.rand(dim, dstate, device=DEVICE)
    kwargs = {"D": A[:, 0], "ssm_state": state, "slots": torch.arange(rows, device=DEVICE) + 1}
    return Sample("step", (u, delta, A, B, C), kwargs)


def delta_rule_tokens(rows: int, *length: int) -> tuple[Tensor, ...]:
    """State, q, k, v, g and beta of rows of so many tokens."""
    q, k = (torch.randn(rows, *length, 2, 16, device=DEVICE) for _ in range(2))
    v, g = torch.randn(rows, *length, 4, 8, device=DEVICE), -torch.rand(rows, *length, 4, device=DEVICE)
    return torch.randn(3 * rows + 2, 4, 8, 16, device=DEVICE), q, k, v, g, g.exp()


def delta_rule_step(rows: int) -> Sample:
    state, q, k, v, g, beta = delta_rule_tokens(rows)
    kwargs = {"g": g, "beta": beta, "slots": torch.arange(rows, device=DEVICE) + 1, "qk_l2norm": True}
    return Sample("step", (state, q, k, v), kwargs)


def delta_rule_prefill(rows: int) -> Sample:
    state, *tokens = delta_rule_tokens(rows, 7)
    kwargs = {"state": state, "slots": torch.arange(rows, device=DEVICE) + 1, "qk_l2norm": True}
    return Sample("step", tuple(tokens), kwargs)


def mixed_plan(rows: int) -> Plan:
    """As many decodes as prefills of two tokens."""
    computed, new = [rows] * rows + [0] * rows, [1] * rows + [2] * rows
    return Plan.of(computed, new, range(2 * rows), max_requests=150, device=DEVICE)


def mamba_step(rows: int) -> Sample:
    inner, dstate, rank = 24, 16, 5
    conv_state = torch.randn(3 * rows + 3, 3, inner, device=DEVICE).transpose(1, 2)
    state = torch.randn(3 * rows + 3, inner, dstate, device=DEVICE)
    weights = (torch.randn(rank + 2 * dstate, inner), torch.randn(inner, rank), torch.rand(inner))
    weights = (torch.randn(inner, 4), None, *weights, -torch.rand(inner, dstate), torch.rand(inner), None, None, None)
    on_device = (w if w is None else w.to(DEVICE) for w in weights)
    projected = torch.randn(3 * rows, 2 * inner, device=DEVICE)
    return Sample("step", (projected, conv_state, state, *on_device, *mixed_plan(rows).tensors), {})


def gdn_step(rows: int) -> Sample:
    k_heads, heads, k_dim, dim = 2, 4, 16, 8
    conv_dim = 2 * k_heads * k_dim + heads * dim
    conv_state = torch.randn(3 * rows + 3, 3, conv_dim, device=DEVICE).transpose(1, 2)
    state = torch.randn(3 * rows + 3, heads, dim, k_dim, device=DEVICE)
    qkvz = torch.randn(3 * rows, conv_dim + heads * dim, device=DEVICE)
    ba = torch.randn(3 * rows, 2 * heads, device=DEVICE)
    on_device = (w.to(DEVICE) for w in (torch.rand(heads), torch.rand(heads)))
    caches = (conv_state, state, torch.randn(conv_dim, 4, device=DEVICE), None)
    sizes = (k_heads, heads, k_dim, dim, True)
    gate = {"z": torch.randn(3 * rows, heads, dim, device=DEVICE)}
    return Sample("step", (qkvz, ba, *caches, *on_device, *mixed_plan(rows).tensors, *sizes), gate)


def mamba2_step(rows: int) -> Sample:
    heads, dim, dstate, groups, tokens = 4, 8, 16, 2, 3 * rows
    conv_dim = heads * dim + 2 * groups * dstate
    plan = mixed_plan(rows)
    conv_state = torch.randn(3 * rows + 3, 3, conv_dim, device=DEVICE).transpose(1, 2)
    state = torch.randn(3 * rows + 3, heads, dim, dstate, device=DEVICE)
    projected = torch.randn(tokens, heads * dim + conv_dim + heads, device=DEVICE)
    weights = (torch.randn(conv_dim, 4), None, -torch.rand(heads), torch.rand(heads), torch.rand(heads))
    on_device = (w if w is None else w.to(DEVICE) for w in weights)
    return Sample("step", (projected, conv_state, state, *on_device, *plan.tensors, heads, dim, dstate, groups, 16), {})


STEPS = [
    pytest.param(mamba_ops.causal_conv1d, conv_prefill, id="causal_conv1d"),
    pytest.param(mamba_ops.causal_conv1d_update, conv_step, id="causal_conv1d_update"),
    pytest.param(mamba_ops.chunk_gated_delta_rule, delta_rule_prefill, id="chunk_gated_delta_rule"),
    pytest.param(mamba_ops.gated_delta_rule_update, delta_rule_step, id="gated_delta_rule_update"),
    pytest.param(mamba_ops.gdn_mixing, gdn_step, id="gdn_mixing"),
    pytest.param(mamba_ops.mamba2_mixing, mamba2_step, id="mamba2_mixing"),
    pytest.param(mamba_ops.mamba_chunk_scan, scan_step, id="mamba_chunk_scan"),
    pytest.param(mamba_ops.mamba_mixing, mamba_step, id="mamba_mixing"),
    pytest.param(mamba_ops.selective_scan, selective_scan_step, id="selective_scan"),
    pytest.param(mamba_ops.selective_state_update, ssm_step, id="selective_state_update"),
]


def test_every_op_has_a_step() -> None:
    assert [p.values[0] for p in STEPS] == OPS


# All of them where they are quick; else 2 to 4, and those beside powers of two.
SIZES_OF_A_GRAPH = [n for n in range(2, 65) if ACCELERATOR or n < 5 or {n - 1, n, n + 1} & {8, 16, 32, 64}]


@pytest.mark.parametrize(("op", "step"), STEPS)
def test_one_graph_for_all_sizes(op: Op[...], step: Callable[[int], Sample]) -> None:
    """Batches 2 to 64 share a graph; 1 and 0 may have one each."""
    compiled = torch.compile(the_call(op), fullgraph=True, dynamic=True)

    def run(rows: int) -> None:
        eager = step(rows)
        other = eager.clone()
        expected, got = op(*eager.args, **eager.kwargs), compiled(*other.args, **other.kwargs)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    for rows in (5, *SIZES_OF_A_GRAPH):
        run(rows)
    assert graphs() == 1
    run(1)
    assert graphs() <= 2
    run(0)
    assert graphs() <= 3


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
@pytest.mark.parametrize(("op", "step"), STEPS)
def test_no_copy_of_a_cache(
    op: Op[...], step: Callable[[int], Sample], layout: Any, inside: str | None, dynamic: bool
) -> None:
    """Read from Inductor's code: nothing is allocated but the output, and nothing is copied.

    The cache comes in as a whole, padded, sliced or transposed tensor; or the graph takes such a view of it itself.
    """
    sample = step(5)
    caches = op.mutates - {"output", "z"}  # that is another output
    names = [p.name for p in op.parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    arguments = dict(zip(names, sample.args, strict=False)) | dict(sample.kwargs)
    for name in caches:
        arguments[name] = layout(arguments[name])
        if inside == "transpose":
            arguments[name] = arguments[name].transpose(-1, -2).contiguous()
    views = {None: lambda c: c, "slice": lambda c: c[1:], "transpose": lambda c: c.transpose(-1, -2)}

    def call(**arguments: Any) -> Tensor:
        return op(**{name: views[inside](a) if name in caches else a for name, a in arguments.items()})

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    with torch._inductor.config.patch(fx_graph_cache=False):  # code from the cache is not written again
        _, [code] = run_and_get_code(compiled, **arguments)
    called = code[code.index("def call(") :]
    assert called.count(f"torch.ops.mamba_ops.{op.name}.default(") == 1
    assert called.count(" = empty_strided") == 1, called
    assert not any(word in called for word in ("copy_(", "clone(", "kernels.", "async_compile")), called


def test_a_layer_of_both_ops_is_one_graph() -> None:
    """Two ops and torch around them: one graph, one copy of nothing, for many batches."""
    conv, ssm = conv_step(4), ssm_step(4)

    def layer(x: Tensor, cache: Tensor, weight: Tensor, *ssm_args: Tensor, slots: Tensor) -> Tensor:
        x = mamba_ops.causal_conv1d_update(x, cache, weight, slots=slots) * 2
        state, _, dt, A, B, C = ssm_args
        heads, dim = state.shape[1:3]
        u = x[:, :1].unsqueeze(1).expand(-1, heads, dim)
        return mamba_ops.selective_state_update(state, u, dt, A, B, C, slots=slots, dt_softplus=True).sin()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for _ in range(3):
        runs = [(conv.clone(), ssm.clone()) for _ in range(2)]
        outs = [f(*c.args, *s.args, slots=c.kwargs["slots"]) for f, (c, s) in zip((layer, compiled), runs, strict=True)]
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
