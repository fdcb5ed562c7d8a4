"""What holds for every layer: token by token in float64 an oracle does the same; nothing is half-updated."""

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.registry import use_backend
from mamba_ops.testing import assert_within_budget
from tests.layers import HIDDEN, KINDS, new_layer
from tests.layers import oracles as oracles_of

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layer(name: str, device: torch.device) -> Any:
    return new_layer(name, device)


def oracles(layer: Any, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    [kind] = [kind for kind in KINDS.values() if kind.layer is type(layer)]
    return oracles_of(kind.oracle, layer, hidden)


def decode(layer: Any, hidden: Tensor, *caches: Tensor, **rows: Any) -> Tensor:
    steps = [layer.step(hidden[:, t], *caches, **rows) for t in range(hidden.shape[1])]
    return torch.stack(steps, dim=1)


WITH_A_PAIR = [name for name, kind in KINDS.items() if kind.layer.Caches._fields == ("conv_state", "ssm_state")]
VARIANTS = [pytest.param(name, c, id=f"{name} {c}") for name, kind in KINDS.items() for c in kind.variants]


# -- what they compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_prefill_then_32_steps_are_the_oracle(name: str, changes: dict[str, Any], device: torch.device) -> None:
    layer = new_layer(name, device, **changes)
    hidden = torch.randn(2, 37 + 32, HIDDEN, device=device)
    expected = oracles(layer, hidden)
    caches = layer.empty_caches(2)
    output = torch.cat([layer(hidden[:, :37], *caches), decode(layer, hidden[:, 37:], *caches)], dim=1)
    for name, actual in {"output": output, **caches._asdict()}.items():
        assert_within_budget(actual.cpu(), *expected[name], name)
    assert_within_budget(layer(hidden).cpu(), *expected["output"], "without caches")


def test_prefill_goes_on_where_prefill_ended(layer: Any, device: torch.device) -> None:
    hidden = torch.randn(2, 50, HIDDEN, device=device)
    expected = oracles(layer, hidden)
    caches = layer.empty_caches(2)
    first = layer(hidden[:, :23], *caches)
    rest = layer(hidden[:, 23:], *caches, has_initial_state=torch.ones(2, dtype=torch.bool, device=device))
    assert_within_budget(torch.cat([first, rest], dim=1).cpu(), *expected["output"])
    for (name, cache), kind in zip(caches._asdict().items(), layer._kinds(), strict=True):
        if not kind.of_inputs:  # those are projections, of another number of rows here
            assert_within_budget(cache.cpu(), *expected[name], name)


def test_packed_sequences_in_slots_are_read_each_by_itself(layer: Any, device: torch.device) -> None:
    lengths, slots = (5, 0, 21, 1), torch.tensor([3, 0, 5, 2], device=device)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    hidden = torch.randn(sum(lengths), HIDDEN, device=device)
    caches = layer.empty_caches(6)
    for cache in caches:
        cache.normal_()
    before = [cache.clone() for cache in caches]
    output = layer(hidden, *caches, slots=slots, cu_seqlens=ends, null_slot=2)
    for row, slot in ((0, 3), (2, 5)):
        own = hidden[ends[row] : ends[row + 1]]
        expected = oracles(layer, own.unsqueeze(0))
        assert_within_budget(output[ends[row] : ends[row + 1]].cpu(), *(t[0] for t in expected["output"]))
        for name, cache in caches._asdict().items():
            assert_within_budget(cache[slot].cpu(), *(t[0] for t in expected[name]), name)
    assert not output[-1].any()  # padding
    for cache, old in zip(caches, before, strict=True):
        others = [0, 1, 2, 4]
        assert torch.equal(cache[others], old[others])


def test_steps_in_slots(layer: Any, device: torch.device) -> None:
    hidden = torch.randn(3, 6, HIDDEN, device=device)
    caches, plain = layer.empty_caches(5), layer.empty_caches(3)
    slots = torch.tensor([4, -1, 1], dtype=torch.int32, device=device)
    output, expected = decode(layer, hidden, *caches, slots=slots), decode(layer, hidden, *plain)
    assert torch.equal(output[[0, 2]], expected[[0, 2]])
    assert not output[1].any()
    for cache, other in zip(caches, plain, strict=True):
        assert torch.equal(cache[[4, 1]], other[[0, 2]])
        assert not cache[[0, 2, 3]].any()
    zero_is_null = decode(
        layer, hidden, *layer.empty_caches(3), slots=torch.tensor([0, 1, 2], device=device), null_slot=0
    )
    assert not zero_is_null[0].any()


def test_several_tokens_in_one_step(layer: Any, device: torch.device) -> None:
    hidden = torch.randn(2, 4, HIDDEN, device=device)
    caches, others = layer.empty_caches(2), layer.empty_caches(2)
    torch.testing.assert_close(layer.step(hidden, *caches), decode(layer, hidden, *others))
    torch.testing.assert_close(caches, others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(name: str, layer: Any, device: torch.device, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    hidden = torch.randn(2, 20, HIDDEN, device=device, dtype=dtype)
    truth = oracles(layer, hidden)["output"][0]
    caches = layer.empty_caches(2, state_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    kept = [cache for cache, kind in zip(caches, layer._kinds(), strict=True) if kind.is_window or kind.of_inputs]
    assert {cache.dtype for cache in kept} == {dtype}
    with use_backend("torch") if dtype == torch.float64 else nullcontext():  # which alone takes float64
        output = torch.cat([layer(hidden[:, :17], *caches), decode(layer, hidden[:, 17:], *caches)], dim=1)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.cpu().double(),
        truth,
        rtol=0,
        atol=KINDS[name].stages * float(truth.abs().max()) * torch.finfo(dtype).eps,
    )


# -- what they refuse ------------------------------------------------------------------------------------------------

BAD_CACHES = {
    "ssm_state too small": lambda ssm: ssm[..., :-1],
    "ssm_state of another rank": lambda ssm: ssm.flatten(1, 2),
    "ssm_state of fewer slots": lambda ssm: ssm[:-1],
    "ssm_state of more slots": lambda ssm: torch.cat([ssm, ssm]),
    "ssm_state of ints": lambda ssm: ssm.int(),
    "ssm_state of float8": lambda ssm: ssm.to(torch.float8_e5m2),
    "conv_state too small": lambda conv: conv[:, :-1],
    "conv_state too short": lambda conv: conv[..., :-1],
}
BAD_ROWS = {
    "fewer slots than sequences": {"slots": torch.tensor([0, 1])},
    "slots of floats": {"slots": torch.tensor([0.0, 1.0, 2.0])},
}


def assert_refused_and_untouched(call: Any, *args: Any, **kwargs: Any) -> None:
    """A ValueError, in eager code as in compiled code, and the caches are as they were."""
    caches = [a for a in args[1:] if a is not None]
    before = [cache.clone() for cache in caches]
    with pytest.raises(ValueError, match=r"got .*expected"):
        call(*args, **kwargs)
    for cache, old in zip(caches, before, strict=True):
        assert cache.is_meta or torch.equal(cache.float(), old.float())  # float8 has no equal


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        pytest.param(name, bad, id=f"{name}-{bad}")
        for bad in (*BAD_CACHES, *BAD_ROWS)
        for name, kind in KINDS.items()
        if bad in BAD_ROWS or bad.split()[0] in kind.layer.Caches._fields
    ],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_nothing_is_half_updated(layer: Any, device: torch.device, bad: str, compiled: bool) -> None:
    named = {name: torch.randn_like(cache) for name, cache in layer.empty_caches(3)._asdict().items()}
    if bad in BAD_CACHES:
        named[bad.split()[0]] = BAD_CACHES[bad](named[bad.split()[0]])
    caches = list(named.values())
    rows = {name: tensor.to(device) for name, tensor in BAD_ROWS.get(bad, {}).items()}
    hidden = torch.randn(3, 5, HIDDEN, device=device)
    for call, tokens in ((layer, hidden), (layer.step, hidden[:, 0].clone())):
        call = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        assert_refused_and_untouched(call, tokens, *caches, **rows)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", WITH_A_PAIR)
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_cache_without_the_other(layer: Any, device: torch.device, compiled: bool) -> None:
    conv_state, ssm_state = layer.empty_caches(3)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    hidden = torch.randn(3, 5, HIDDEN, device=device)
    assert_refused_and_untouched(call, hidden, conv_state, None)
    assert_refused_and_untouched(call, hidden, None, ssm_state)


@pytest.mark.parametrize("name", WITH_A_PAIR)
def test_caches_on_two_devices(layer: Any, device: torch.device) -> None:
    conv_state, ssm_state = layer.empty_caches(3)
    assert_refused_and_untouched(layer, torch.randn(3, 5, HIDDEN, device=device), conv_state, ssm_state.to("meta"))


def test_every_parameter_has_a_gradient(layer: Any, device: torch.device) -> None:
    with torch.enable_grad():
        layer(torch.randn(1, 3, HIDDEN, device=device)).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert len(gradients) >= 3
    assert {name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()} == set()


def test_gradients_through_caches_are_refused(layer: Any, device: torch.device) -> None:
    caches = layer.empty_caches(1)
    call = functools.partial(layer, torch.randn(1, 3, HIDDEN, device=device), *caches)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"expected none: .*; else call it under torch.no_grad"):
        call()
    assert not any(cache.any() for cache in caches)
