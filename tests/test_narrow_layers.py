"""Layers, pools and engines with states in int16 and float8_e4m3fn."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mamba_ops import functional, use_backend
from mamba_ops.layers import KimiDeltaAttention, Mamba2, Mamba3, ShortConv
from mamba_ops.layers.caches import ConvAndNarrowState
from mamba_ops.ops._common.narrow import MOST, as_bytes, widen
from mamba_ops.registry import NoBackendError, ops
from mamba_ops.serving import PiecewiseRunner, Plan, StatePool
from tests.fuzz.targets import layers

pytestmark = pytest.mark.usefixtures("no_grad")

LAYERS = {type(layer).__name__: layer for layer in layers() if layer.NarrowCaches is not None}
OFF = {torch.int16: 2e-4, torch.float8_e4m3fn: 0.1}
"""How far an output may be from that with float32 states, by the largest output."""


def close(got: Tensor, right: Tensor, dtype: torch.dtype) -> None:
    assert float((got - right).abs().max()) <= OFF[dtype] * float(right.abs().max())


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", LAYERS)
def test_prefill_and_steps(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]
    hidden, slots = torch.randn(3, 9, 16), torch.tensor([2, -1, 0])
    caches = layer.empty_caches(4, state_dtype=dtype)
    assert type(caches) is ConvAndNarrowState
    assert [cache.dtype for cache in caches] == [torch.float32, dtype, torch.float32]
    wide = layer.empty_caches(4)
    initial = torch.tensor([False, True, True])
    for has, tokens in ((None, slice(0, 4)), (initial, slice(4, 7))):
        got, right = (layer(hidden[:, tokens], *c, slots=slots, has_initial_state=has) for c in (caches, wide))
        close(got, right, dtype)
    for t in (7, 8):
        close(layer.step(hidden[:, t], *caches, slots=slots), layer.step(hidden[:, t], *wide, slots=slots), dtype)
    close(widen(caches.ssm_state, caches.state_scale, torch.float32), wide.ssm_state, dtype)
    assert not as_bytes(caches.ssm_state)[[1, 3]].any()


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.takes_plans])
def test_plans_do_what_calls_and_steps_do(name: str, dtype: torch.dtype) -> None:
    """To the bit, in states: a decode, a prompt that goes on, one that begins, one without a slot."""
    torch.manual_seed(0)
    layer = LAYERS[name]
    hidden, caches = torch.randn(10, 16), layer.empty_caches(5, state_dtype=dtype)
    for cache in caches:
        numbers = torch.rand(cache.shape) * (9000 if cache.dtype == torch.int16 else 1)
        as_bytes(cache).copy_(as_bytes(numbers.to(cache.dtype)))
    other = type(caches)(*(cache.clone() for cache in caches))
    plan = Plan.of([3, 4, 0], [1, 5, 4], [1, 2, 0], max_requests=4, null_slot=4)
    got = layer(hidden, *caches, plan=plan)
    step = layer.step(hidden[:1], *other, slots=torch.tensor([1]))
    ends, known = torch.tensor([0, 5, 9]), torch.tensor([True, False])
    read = layer(hidden[1:], *other, slots=torch.tensor([2, 0]), cu_seqlens=ends, has_initial_state=known)
    torch.testing.assert_close(got, torch.cat([step, read]), rtol=1e-5, atol=1e-5)
    for one, two in zip(caches[1:], other[1:], strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=1e-5, atol=1.0 if one.dtype == torch.int16 else 1e-5)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.takes_plans])
def test_what_goes_on_from_a_kept_state_is_as_for_the_request_that_kept_it(name: str, dtype: torch.dtype) -> None:
    """To the bit: that one, too, reads on from the rounded state."""
    torch.manual_seed(0)
    layer = LAYERS[name]
    hidden, caches = torch.randn(9, 16), layer.empty_caches(4, state_dtype=dtype)
    first = Plan.of([0], [9], [0], keep=[{4: 1}], rounds=2, max_requests=2)
    second = Plan.of([4], [5], [2], sources=[1], rounds=2, max_requests=2)
    assert torch.equal(layer(hidden, *caches, plan=first)[4:], layer(hidden[4:], *caches, plan=second))
    for cache in caches:
        assert torch.equal(as_bytes(cache[0]), as_bytes(cache[2]))


@pytest.mark.parametrize("dtype", MOST)
def test_one_graph(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    layer = LAYERS["Mamba2"]
    hidden, caches = torch.randn(2, 5, 16), layer.empty_caches(4, state_dtype=dtype)
    other = type(caches)(*(cache.clone() for cache in caches))

    def both(hidden: Tensor, caches: Any) -> tuple[Tensor, Tensor]:
        return layer(hidden[:, :4], *caches), layer.step(hidden[:, 4], *caches)

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, caches)
    torch.testing.assert_close(got, both(hidden, other))
    assert torch.equal(as_bytes(caches.ssm_state), as_bytes(other.ssm_state))


class Model(nn.Module):
    def __init__(self, pool: StatePool, layers: nn.ModuleDict) -> None:
        super().__init__()
        self.embedding, self.layers, self.pool = nn.Embedding(64, 16), layers, pool

    def forward(self, tokens: Tensor, plan: Plan) -> Tensor:
        hidden = self.embedding(tokens)
        for name, layer in self.layers.items():
            hidden = hidden + layer(hidden, *self.pool.caches[name], plan=plan)
        return hidden


@pytest.mark.parametrize("dtype", MOST)
def test_an_engine(dtype: torch.dtype) -> None:
    """Prompts in rounds whose prefix is kept, a hit, speculative decodes that are rolled back, a branch."""
    torch.manual_seed(0)
    hybrid = nn.ModuleDict({"a": Mamba2(16, heads=2, head_dim=8, dstate=4), "b": ShortConv(16)})
    hybrid["c"] = KimiDeltaAttention(16, num_heads=2, head_dim=8)
    found = []
    for state_dtype in (torch.float32, dtype):
        pool = StatePool.of(dict(hybrid.items()), 10, columns=3, state_dtype=state_dtype)
        torch.manual_seed(1)
        model, tokens = Model(pool, hybrid), torch.arange(40) % 64
        shared: dict[str, Any] = {"max_requests": 8, "rounds": 2}
        results = [model(tokens[:8], Plan.of([0], [8], [0], keep=[{4: 5}], **shared))]
        results.append(model(tokens[4:9], Plan.of([4], [5], [1], sources=[5], **shared)))
        decode = Plan.of([8, 9], [3, 2], [[0, 2, 3], [1, 4, 6]], accepted=[1, 1], max_requests=8)
        results.append(model(tokens[9:14], decode))
        pool.copy([0, 2, 3], 7, accepted=2)
        slots = [[0, 2, 3], [1, 4, 6], [7, 8, 9]]
        again = Plan.of([10, 10, 10], [1, 1, 1], slots, accepted=[2, 1, 1], max_requests=8)
        results.append(model(torch.tensor([9, 3, 9]), again))
        found.append(results)
    for right, got in zip(*found, strict=True):
        close(got, right, dtype)
    original, _, branch = found[1][-1]
    torch.testing.assert_close(branch, original)


@pytest.mark.parametrize("dtype", MOST)
def test_the_runner(dtype: torch.dtype) -> None:
    """It runs a prompt and decodes over pages, as the model does that is called."""
    torch.manual_seed(0)
    hybrid, results = nn.ModuleDict({"a": LAYERS["Mamba2"]}), []
    for runs in (False, True):
        pool = StatePool.of(dict(hybrid.items()), 4, state_dtype=dtype)
        torch.manual_seed(1)
        run: Any = Model(pool, hybrid)
        tokens = torch.randint(64, (9,), generator=torch.Generator().manual_seed(2))
        if runs:
            runner = PiecewiseRunner(run, max_tokens=16, max_requests=2, compile_piece="eager")
            run = lambda tokens, plan, runner=runner: runner(plan, tokens)  # noqa: E731
        found = [run(tokens[:5], Plan.of([0], [5], [2], max_requests=2)).clone()]
        found += [run(tokens[t : t + 1], Plan.of([t], [1], [2], max_requests=2)).clone() for t in range(5, 9)]
        results.append(found)
    for right, got in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"Mamba3: state_dtype: got int16, expected a float of 16 bits or more; no op"):
        Mamba3(16, heads=2, head_dim=8, dstate=8).empty_caches(2, state_dtype=torch.int16)
    assert len(ShortConv(16).empty_caches(2, state_dtype=torch.int16)) == 1
    layer, hidden = LAYERS["Mamba2"], torch.randn(2, 3, 16)
    caches = layer.empty_caches(2, state_dtype=torch.int16)
    before = [cache.clone() for cache in caches]
    for bad, match in {
        (*caches[:2],): r"conv_state, ssm_state: got .* torch.int16 on cpu, expected neither or a pair",
        (*caches[:2], caches[2].double()): "of int16 or float8_e4m3fn, with scales of float32",
        (*caches[:2], caches[2][:, :1]): r"state_scale \(slots, 2, 8\)",
        (caches[0], caches[1].float(), caches[2]): "of int16 or float8_e4m3fn, with scales of float32",
    }.items():
        with pytest.raises(ValueError, match=match):
            layer(hidden, *bad)
        with pytest.raises(ValueError, match=match):
            layer.step(hidden, *bad)
    assert all(map(torch.equal, caches, before))
    with pytest.raises(ValueError, match=r"state_dtype: got torch\.int32, expected a floating"):
        layer.empty_caches(2, state_dtype=torch.int32)


@pytest.mark.parametrize("name", ["mamba_chunk_scan", "selective_scan", "chunk_gated_delta_rule", "chunk_kda"])
def test_ops_over_sequences_say_what_widens_a_state(name: str) -> None:
    op = ops()[name]
    sample = next(s for s in op.make_samples("cpu") if s.kwargs.get("ssm_state") is not None)
    narrow = {**sample.kwargs, "ssm_state": sample.kwargs["ssm_state"].to(torch.int16)}
    message = r"ssm_state: got int16, expected .*; mamba_ops\.functional\.widen_states makes one of it"
    with pytest.raises(ValueError, match=message):
        op(*sample.args, **narrow)


def test_a_backend_that_takes_no_narrow_state_says_so() -> None:
    caches = LAYERS["Mamba"].empty_caches(2, state_dtype=torch.int16)
    said = r"cpp +takes states of 16-bit floats and wider ones, and ssm_state is int16"
    with use_backend("cpp"), pytest.raises(NoBackendError, match=said):
        LAYERS["Mamba"].step(torch.randn(2, 16), *caches)


def test_functions() -> None:
    states = torch.randn(3, 2, 8, 64)
    for dtype in MOST:
        state, scale = functional.narrow_states(states, dtype)
        assert (state.dtype, scale.dtype, scale.shape) == (dtype, torch.float32, (3, 2, 8))
        close(functional.widen_states(state, scale), states, dtype)
    with pytest.raises(ValueError, match=r"narrow_states: dtype: got torch.int8, expected torch.int16 or"):
        functional.narrow_states(states, torch.int8)
    with pytest.raises(ValueError, match=r"narrow_states: states: got .* of torch.int16, expected floats of 16"):
        functional.narrow_states(states.to(torch.int16))
    with pytest.raises(ValueError, match=r"widen_states: state_scale: got shape \(3, 2\), expected \(3, 2, 8\)"):
        functional.widen_states(state, scale[..., 0])
