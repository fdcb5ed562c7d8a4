"""layers.Mamba2 against an oracle that reads token by token in float64, and against those whose weights it loads."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.layers import Mamba2, gated_rms_norm
from mamba_ops.registry.samples import assert_within_budget

SIZES: dict[str, Any] = {"heads": 4, "head_dim": 8, "dstate": 16, "groups": 2, "chunk_size": 16}
HIDDEN = 24


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def layer(device: torch.device) -> Mamba2:
    return new_layer(device)


def new_layer(device: torch.device | str, **changes: Any) -> Mamba2:
    layer = Mamba2(HIDDEN, **{**SIZES, **changes}, device=device)
    layer.D.copy_(torch.randn(layer.heads))
    layer.norm.weight.copy_(torch.rand(layer.norm.weight.shape) + 0.5)
    return layer


class Oracle:
    """The layer written from its formulas, one sequence and one token at a time; it keeps the sequence's state."""

    def __init__(self, layer: Mamba2, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.weights = {name: p.detach().cpu().to(dtype) for name, p in layer.state_dict().items()}
        dim, _, width = layer.conv1d.weight.shape
        self.window = torch.zeros(width - 1, dim, dtype=dtype)
        self.state = torch.zeros(layer.heads, layer.head_dim, layer.dstate, dtype=dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = self.weights[f"{name}.weight"] @ x
        return y if bias is None else y + bias

    def token(self, hidden: Tensor) -> Tensor:
        layer, weights = self.layer, self.weights
        gate, mixed, dt = self.linear(hidden, "in_proj").split(layer.projected)
        window = torch.cat([self.window, mixed.unsqueeze(0)])
        self.window = window[1:]
        mixed = (window.t() * weights["conv1d.weight"].squeeze(1)).sum(1)
        if "conv1d.bias" in weights:
            mixed = mixed + weights["conv1d.bias"]
        mixed = mixed * torch.sigmoid(mixed)
        x, B, C = mixed.split(layer.convolved)
        y = torch.empty(layer.heads, layer.head_dim, dtype=self.dtype)
        for h in range(layer.heads):
            group = slice(h // (layer.heads // layer.groups) * layer.dstate, None)
            b, c = B[group][: layer.dstate], C[group][: layer.dstate]
            u = x[h * layer.head_dim : (h + 1) * layer.head_dim]
            d = torch.log1p(torch.exp(dt[h] + weights["dt_bias"][h])).clamp(layer.dt_min, layer.dt_max)
            decay = torch.exp(-torch.exp(weights["A_log"][h]) * d)
            self.state[h] = self.state[h] * decay + d * u.unsqueeze(1) * b
            y[h] = self.state[h] @ c + weights["D"][h] * u
        y = y.flatten() * gate * torch.sigmoid(gate)
        for part in y.split(y.numel() // layer.groups):
            part /= (part.square().mean() + layer.norm.eps).sqrt()
        return self.linear(y * weights["norm.weight"], "out_proj")

    def read(self, hidden: Tensor) -> Tensor:
        return torch.stack([self.token(h) for h in hidden.cpu().to(self.dtype)])


def oracles(layer: Mamba2, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For a batch: truth and float32 result of the output, the conv state and the ssm state."""
    by_dtype = []
    for dtype in (torch.float64, torch.float32):
        rows = [Oracle(layer, dtype) for _ in hidden]
        output = torch.stack([row.read(h) for row, h in zip(rows, hidden, strict=True)])
        window = torch.stack([row.window.t() for row in rows])
        by_dtype.append((output, window, torch.stack([row.state for row in rows])))
    truth, low = by_dtype
    return dict(zip(("output", "conv_state", "ssm_state"), zip(truth, low, strict=True), strict=True))


def decode(layer: Mamba2, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor, **rows: Any) -> Tensor:
    steps = [layer.step(hidden[:, t], conv_state, ssm_state, **rows) for t in range(hidden.shape[1])]
    return torch.stack(steps, dim=1)


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"groups": 1, "width": 2},
        {"bias": True, "conv_bias": False},
        {"dt_min": 0.02, "dt_max": 0.05},
        {"dt_min": 0.02},
        {"chunk_size": 256},
    ],
    ids=str,
)
def test_prefill_then_32_steps_are_the_oracle(device: torch.device, changes: dict[str, Any]) -> None:
    layer = new_layer(device, **changes)
    hidden = torch.randn(2, 37 + 32, HIDDEN, device=device)
    expected = oracles(layer, hidden)
    caches = layer.empty_caches(2)
    output = torch.cat([layer(hidden[:, :37], *caches), decode(layer, hidden[:, 37:], *caches)], dim=1)
    for name, actual in (("output", output), ("conv_state", caches[0]), ("ssm_state", caches[1])):
        assert_within_budget(actual.cpu(), *expected[name], name)
    assert_within_budget(layer(hidden).cpu(), *expected["output"], "without caches")


def test_prefill_goes_on_where_prefill_ended(layer: Mamba2, device: torch.device) -> None:
    hidden = torch.randn(2, 50, HIDDEN, device=device)
    expected = oracles(layer, hidden)
    caches = layer.empty_caches(2)
    first = layer(hidden[:, :23], *caches)
    rest = layer(hidden[:, 23:], *caches, has_initial_state=torch.ones(2, dtype=torch.bool, device=device))
    assert_within_budget(torch.cat([first, rest], dim=1).cpu(), *expected["output"])
    assert_within_budget(caches[1].cpu(), *expected["ssm_state"])


def test_packed_sequences_in_slots_are_read_each_by_itself(layer: Mamba2, device: torch.device) -> None:
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
        for cache, name in zip(caches, ("conv_state", "ssm_state"), strict=True):
            assert_within_budget(cache[slot].cpu(), *(t[0] for t in expected[name]), name)
    assert not output[-1].any()  # nobody's
    for cache, old in zip(caches, before, strict=True):
        others = [0, 1, 2, 4]
        assert torch.equal(cache[others], old[others])


def test_steps_in_slots(layer: Mamba2, device: torch.device) -> None:
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


def test_several_tokens_in_one_step(layer: Mamba2, device: torch.device) -> None:
    hidden = torch.randn(2, 4, HIDDEN, device=device)
    caches, others = layer.empty_caches(2), layer.empty_caches(2)
    torch.testing.assert_close(layer.step(hidden, *caches), decode(layer, hidden, *others))
    torch.testing.assert_close(caches, others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    layer = new_layer(device).to(dtype)
    hidden = torch.randn(2, 20, HIDDEN, device=device, dtype=dtype)
    truth = oracles(layer, hidden)["output"][0]
    caches = layer.empty_caches(2, state_dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert caches[0].dtype == dtype
    output = torch.cat([layer(hidden[:, :17], *caches), decode(layer, hidden[:, 17:], *caches)], dim=1)
    assert output.dtype == dtype
    # a result is rounded at each of the layer's six stages: projection, convolution, scan, norm, projection, output
    torch.testing.assert_close(
        output.cpu().double(), truth, rtol=0, atol=6 * float(truth.abs().max()) * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_rms_norm(device: torch.device, groups: int, norm_before_gate: bool) -> None:
    x, gate = (torch.randn(3, 5, 16, device=device, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(16, device=device, dtype=torch.float64)
    got = gated_rms_norm(x, gate, weight, groups=groups, eps=1e-3, norm_before_gate=norm_before_gate)
    opened = gate * torch.sigmoid(gate)
    h = x if norm_before_gate else x * opened
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt() for part in h.split(16 // groups, dim=-1)]
    expected = torch.cat(parts, dim=-1) * weight * (opened if norm_before_gate else 1)
    torch.testing.assert_close(got, expected)
    assert gated_rms_norm(x.half(), gate, weight).dtype == torch.float16


# -- whose weights it loads -------------------------------------------------------------------------------------------


def test_parameters_are_named_and_shaped_as_in_mamba_ssm(layer: Mamba2) -> None:
    inner, conv_dim = 32, 32 + 2 * 2 * 16
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "in_proj.weight": (inner + conv_dim + 4, HIDDEN),
        "conv1d.weight": (conv_dim, 1, 4),
        "conv1d.bias": (conv_dim,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (inner,),
        "out_proj.weight": (HIDDEN, inner),
    }


def test_new_step_sizes_are_log_uniform_in_their_range() -> None:
    steps = functional.softplus(new_layer("cpu", heads=512, head_dim=1).dt_bias)
    torch.testing.assert_close(torch.stack([steps.min(), steps.max()]), torch.tensor([1e-3, 1e-1]), rtol=0.02, atol=0)
    torch.testing.assert_close(steps.log().mean(), torch.tensor(1e-2).log(), rtol=0.02, atol=0)


def transformers_mixer(**changes: Any) -> Any:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 16}
    config = modeling.Mamba2Config(**{**sizes, "num_hidden_layers": 1, **changes})
    mixer = modeling.Mamba2Mixer(config, layer_idx=0)
    mixer.norm.weight.copy_(torch.rand(64) + 0.5)
    return config, mixer


@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False, "n_groups": 1}], ids=str)
def test_equals_the_mixer_of_transformers(device: torch.device, changes: dict[str, Any]) -> None:
    """Prefill and 32 steps: as near to Transformers' output as their and our distances from the truth allow."""
    config, mixer = transformers_mixer(**changes)
    from transformers import DynamicCache

    layer = Mamba2.from_config(config)
    layer.load_state_dict(mixer.state_dict())
    mixer, layer = mixer.to(device), layer.to(device)
    hidden = torch.randn(2, 37 + 32, 32, device=device)
    truth, low = oracles(layer, hidden)["output"]

    cache, caches = DynamicCache(config=config), layer.empty_caches(2)
    parts = [hidden[:, :37], *hidden[:, 37:].split(1, dim=1)]
    theirs = torch.cat([mixer(part, cache_params=cache) for part in parts], dim=1).cpu()
    ours = torch.cat([layer(parts[0], *caches), *(layer.step(part, *caches) for part in parts[1:])], dim=1).cpu()
    assert_within_budget(ours, truth, low)
    slip = 2 * (low - truth).abs().max() + (theirs - truth).abs().max()
    torch.testing.assert_close(ours, theirs, rtol=torch.finfo(torch.float32).eps, atol=float(slip))


def config_with(**changes: Any) -> SimpleNamespace:
    """What `from_config` reads of a Mamba2Config."""
    attributes = {
        "hidden_size": 32,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "time_step_limit": (0.0, float("inf")),
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
    }
    return SimpleNamespace(**attributes | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 256),
        ({"chunk_size": 64}, 64),
        ({"chunk_size": 64, "mamba_chunk_size": 32}, 32),
        ({"chunk_size": 64.0, "mamba_chunk_size": None}, 64),
    ],
    ids=str,
)
def test_chunk_size_of_a_config_is_an_int(changes: dict[str, Any], expected: int) -> None:
    chunk_size = Mamba2.from_config(config_with(**changes)).chunk_size
    assert chunk_size == expected
    assert type(chunk_size) is int


def test_from_config_reads_the_rest() -> None:
    changes = {"time_step_limit": [0, 0.5], "layer_norm_epsilon": 1e-3, "use_bias": True, "use_conv_bias": False}
    layer = Mamba2.from_config(config_with(**changes), dtype=torch.bfloat16)
    assert (layer.dt_min, layer.dt_max, layer.norm.eps, layer.norm.groups) == (0.0, 0.5, 1e-3, 2)
    assert layer.in_proj.bias is not None
    assert layer.conv1d.bias is None
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert Mamba2.from_config(config_with()).dt_max == math.inf
    assert "heads=8" in repr(layer)


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_a_config_that_is_not_supported() -> None:
    with pytest.raises(ValueError, match="hidden_act: got 'gelu', expected 'silu'"):
        Mamba2.from_config(config_with(hidden_act="gelu"))
    with pytest.raises(ValueError, match="no attribute 'num_heads'; expected Transformers' Mamba2Config"):
        Mamba2.from_config(SimpleNamespace(hidden_size=32, hidden_act="silu", time_step_limit=(0, 1)))
    with pytest.raises(ValueError, match="groups: got 3, expected a divisor of the 4 heads"):
        new_layer("cpu", groups=3)


BAD_CACHES = {
    "ssm state too small": lambda conv, ssm: (conv, ssm[..., :-1]),
    "ssm state without heads": lambda conv, ssm: (conv, ssm.flatten(1, 2)),
    "fewer ssm slots": lambda conv, ssm: (conv, ssm[:-1]),
    "more ssm slots": lambda conv, ssm: (conv, torch.cat([ssm, ssm])),
    "ssm state of ints": lambda conv, ssm: (conv, ssm.int()),
    "ssm state of float8": lambda conv, ssm: (conv, ssm.to(torch.float8_e5m2)),
    "conv state too small": lambda conv, ssm: (conv[:, :-1], ssm),
    "conv state too short": lambda conv, ssm: (conv[..., :-1], ssm),
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


@pytest.mark.parametrize("bad", [*BAD_CACHES, *BAD_ROWS])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_nothing_is_half_updated(layer: Mamba2, device: torch.device, bad: str, compiled: bool) -> None:
    caches = [torch.randn_like(cache) for cache in layer.empty_caches(3)]
    caches = BAD_CACHES.get(bad, lambda *pair: pair)(*caches)
    rows = {name: tensor.to(device) for name, tensor in BAD_ROWS.get(bad, {}).items()}
    hidden = torch.randn(3, 5, HIDDEN, device=device)
    for call, tokens in ((layer, hidden), (layer.step, hidden[:, 0].clone())):
        call = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        assert_refused_and_untouched(call, tokens, *caches, **rows)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_cache_without_the_other(layer: Mamba2, device: torch.device, compiled: bool) -> None:
    conv_state, ssm_state = layer.empty_caches(3)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    hidden = torch.randn(3, 5, HIDDEN, device=device)
    assert_refused_and_untouched(call, hidden, conv_state, None)
    assert_refused_and_untouched(call, hidden, None, ssm_state)


def test_caches_on_two_devices(layer: Mamba2, device: torch.device) -> None:
    conv_state, ssm_state = layer.empty_caches(3)
    assert_refused_and_untouched(layer, torch.randn(3, 5, HIDDEN, device=device), conv_state, ssm_state.to("meta"))


def test_gradients_are_refused(layer: Mamba2, device: torch.device) -> None:
    with torch.enable_grad(), pytest.raises(ValueError, match="does not record gradients yet"):
        layer(torch.randn(1, 3, HIDDEN, device=device))
