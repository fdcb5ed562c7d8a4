"""vLLM's functions for the gated delta rule over our ops, against the recurrence token by token; its norms."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.compat import vllm
from mamba_ops.registry import use_backend
from tests.vllm_inputs import DEVICE, ints

HK, HV, K, V = 2, 4, 8, 6
ORIGINALS = {  # of vLLM 0.33
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state cu_seqlens chunk_indices "
    "chunk_offsets use_qk_l2norm_in_kernel core_attn_out",
    "fused_recurrent_gated_delta_rule": "q k v g beta scale initial_state inplace_final_state cu_seqlens "
    "ssm_state_indices num_accepted_tokens use_qk_l2norm_in_kernel",
    "fused_recurrent_gated_delta_rule_packed_decode": "mixed_qkv a b A_log dt_bias scale initial_state out "
    "ssm_state_indices use_qk_l2norm_in_kernel",
    "fused_sigmoid_gating_delta_rule_update": "A_log a b dt_bias q k v beta threshold scale initial_state "
    "inplace_final_state cu_seqlens ssm_state_indices num_accepted_tokens use_qk_l2norm_in_kernel is_kda",
    "fused_post_conv_prep": "conv_output a b A_log dt_bias num_k_heads head_k_dim head_v_dim apply_l2norm output_g_exp",
    "l2norm_fwd": "x eps output_dtype",
    "rms_norm_gated": "x weight bias z eps group_size norm_before_gate",
    "RMSNormGated": "hidden_size eps group_size norm_before_gate device dtype activation",
}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # which alone takes float64
        yield


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_parameter_has_its_name_and_place(name: str) -> None:
    assert list(inspect.signature(getattr(vllm, name)).parameters) == ORIGINALS[name].split()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float64)


def tokens(*lead: int) -> dict[str, Tensor]:
    return {
        "q": normal(*lead, HK, K),
        "k": normal(*lead, HK, K),
        "v": normal(*lead, HV, V),
        "g": -normal(*lead, HV).exp(),
        "beta": normal(*lead, HV).sigmoid(),
    }


def states(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the state after every token of one sequence, `(tokens, ...)`, with normalised q and k."""
    q, k = (functional.normalize(t, dim=-1, eps=1e-12).repeat_interleave(HV // HK, 1) for t in (q, k))
    out, kept = [], []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[:, None, None]
        delta = (v[t] - (state * k[t][:, None]).sum(-1)) * beta[t][:, None]
        state = state + delta[..., None] * k[t][:, None]
        out.append((state * q[t][:, None] * K**-0.5).sum(-1))
        kept.append(state)
    return torch.stack(out), torch.stack(kept)


NEAR = {"rtol": 1e-5, "atol": 1e-5}


def test_chunks_of_packed_sequences() -> None:
    given, start, ends = tokens(1, 12), normal(2, HV, V, K), ints(0, 5, 12)
    place = torch.zeros(1000, device=DEVICE, dtype=torch.float64)
    out, last = vllm.chunk_gated_delta_rule(
        **given, initial_state=start, output_final_state=True, cu_seqlens=ends, use_qk_l2norm_in_kernel=True,
        core_attn_out=place,
    )  # fmt: skip
    assert out.data_ptr() == place.data_ptr()
    assert not place[out.numel() :].any()
    for row, (begin, end) in enumerate(((0, 5), (5, 12))):
        want, kept = states(**{n: t[0, begin:end] for n, t in given.items()}, state=start[row])
        torch.testing.assert_close(out[0, begin:end], want, **NEAR)
        torch.testing.assert_close(last[row], kept[-1], **NEAR)
    assert vllm.chunk_gated_delta_rule(**given)[1] is None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("accepted", [None, (2, 1, 1)])
def test_a_few_tokens_of_packed_rows(gated: bool, in_place: bool, accepted: tuple[int, ...] | None) -> None:
    """The third row is padding."""
    given, cache = tokens(1, 7), normal(9, HV, V, K)
    begun, ends, table = cache.clone(), ints(0, 3, 5, 7), ints([3, 4, 5], [7, 1, 2], [0, 0, 0])
    options: dict[str, Any] = {"initial_state": cache, "cu_seqlens": ends, "ssm_state_indices": table}
    options |= {"inplace_final_state": in_place, "use_qk_l2norm_in_kernel": True}
    options["num_accepted_tokens"] = None if accepted is None else ints(*accepted)
    if gated:
        weights, raw = {"A_log": normal(HV), "dt_bias": normal(HV)}, {"a": normal(7, HV), "b": normal(7, HV)}
        given["g"] = (-weights["A_log"].exp() * functional.softplus(raw["a"] + weights["dt_bias"]))[None]
        given["beta"] = raw["b"].sigmoid()[None]
        inputs = {n: given[n] for n in "qkv"} | weights | raw
        out, after = vllm.fused_sigmoid_gating_delta_rule_update(**inputs, **options)
        other = options | {"initial_state": begun.clone()}
        sharp = vllm.fused_sigmoid_gating_delta_rule_update(**inputs, **other, beta=2.0)
        assert not torch.allclose(sharp[0][0, :5], out[0, :5])
    else:
        out, after = vllm.fused_recurrent_gated_delta_rule(**given, **options)
    assert (after is cache) == in_place
    assert in_place or torch.equal(cache, begun)
    for row, (begin, end) in enumerate(((0, 3), (3, 5))):
        column = 0 if accepted is None else accepted[row] - 1
        want, kept = states(**{n: t[0, begin:end] for n, t in given.items()}, state=begun[table[row, column]])
        torch.testing.assert_close(out[0, begin:end], want, **NEAR)
        found = cache[table[row, : end - begin].long()] if in_place else after[begin:end]
        torch.testing.assert_close(found, kept, **NEAR)
    if in_place:
        assert not out[0, 5:].any()
        assert torch.equal(cache[0], begun[0])


def test_one_token_a_row() -> None:
    given, cache = tokens(3, 1), normal(5, HV, V, K)
    begun = cache.clone()
    options: dict[str, Any] = {"ssm_state_indices": ints(2, 0, 4), "use_qk_l2norm_in_kernel": True}
    out, _ = vllm.fused_recurrent_gated_delta_rule(**given, initial_state=cache, **options)
    for row, slot in ((0, 2), (2, 4)):
        want, kept = states(**{n: t[row] for n, t in given.items()}, state=begun[slot])
        torch.testing.assert_close(out[row], want, **NEAR)
        torch.testing.assert_close(cache[slot], kept[-1], **NEAR)
    assert torch.equal(cache[[0, 1, 3]], begun[[0, 1, 3]])
    del given["beta"]
    ones = {"beta": torch.ones(3, 1, HV, device=DEVICE, dtype=torch.float64)}
    runs = [
        vllm.fused_recurrent_gated_delta_rule(**given, **more, initial_state=begun.clone(), **options)
        for more in ({}, ones)
    ]
    torch.testing.assert_close(*runs)
    _, after = vllm.fused_recurrent_gated_delta_rule(
        **given, initial_state=begun[:3], inplace_final_state=False, use_qk_l2norm_in_kernel=True
    )
    assert after.shape == (3, HV, V, K)


def test_packed_decode_and_what_goes_before_it() -> None:
    mixed, a, b = normal(3, 2 * HK * K + HV * V), normal(3, HV), normal(3, HV)
    A_log, dt_bias, cache = normal(HV), normal(HV), normal(5, HV, V, K)
    begun, out = cache.clone(), normal(3, 1, HV, V)
    result = vllm.fused_recurrent_gated_delta_rule_packed_decode(
        mixed, a, b, A_log, dt_bias, K**-0.5, cache, out, ints(2, 0, 4), True
    )
    assert result[0] is out
    assert result[1] is cache
    q, k, v, g, beta = vllm.fused_post_conv_prep(mixed, a, b, A_log, dt_bias, HK, K, V)
    assert (g.dtype, beta.dtype) == (torch.float32, torch.float32)
    assert q.is_contiguous()
    for row, slot in ((0, 2), (2, 4)):
        want, kept = states(*(t[row : row + 1] for t in (q, k, v)), g[row : row + 1], beta[row : row + 1], begun[slot])
        torch.testing.assert_close(out[row], want, **NEAR)
        torch.testing.assert_close(cache[slot], kept[-1], **NEAR)
    assert not out[1].any()
    decay = vllm.fused_post_conv_prep(mixed, a, b, A_log, dt_bias, HK, K, V, False, True)
    torch.testing.assert_close(decay[3], g.exp())
    torch.testing.assert_close(decay[0].flatten(1), mixed[:, : HK * K])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"initial_state": None}, "initial_state: got None, expected the cache"),
        ({"ssm_state_indices": None}, "ssm_state_indices: got None with inplace_final_state, expected the rows' slots"),
        ({"cu_seqlens": ints(0, 3)}, "v: got a batch of 3, expected 1, as the rows are packed"),
    ],
)
def test_wrong_calls_write_nothing(change: dict[str, Any], error: str) -> None:
    cache = torch.zeros(5, HV, V, K, device=DEVICE)
    options: dict[str, Any] = {"initial_state": cache, "ssm_state_indices": ints(2, 0, 4)} | change
    with pytest.raises(ValueError, match=f"^fused_recurrent_gated_delta_rule: {error}"):
        vllm.fused_recurrent_gated_delta_rule(**tokens(3, 1), **options)
    assert not cache.any()


def test_other_refusals() -> None:
    inputs = {n: t for n, t in tokens(1, 1).items() if n in "qkv"}
    with pytest.raises(ValueError, match="fused_sigmoid_gating_delta_rule_update: is_kda: got a bool, expected none"):
        vllm.fused_sigmoid_gating_delta_rule_update(*(normal(HV),) * 4, **inputs, is_kda=True)
    cache, out = normal(5, HV, V, K), normal(3, 1, HV, V)
    with pytest.raises(ValueError, match=r"packed_decode: mixed_qkv: got 50 channels, expected 4 \* 6 of v"):
        vllm.fused_recurrent_gated_delta_rule_packed_decode(
            normal(3, 50), normal(3, HV), normal(3, HV), normal(HV), normal(HV), None, cache, out, ints(2, 0, 4)
        )
    with pytest.raises(ValueError, match="RMSNormGated: activation: got 'gelu', expected 'swish', 'silu', 'sigmoid'"):
        vllm.RMSNormGated(6, activation="gelu")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
def test_the_gated_norm(before: bool, activation: str) -> None:
    norm = vllm.RMSNormGated(12, 1e-3, 4, before, device=DEVICE, dtype=torch.float64, activation=activation)
    torch.nn.init.normal_(norm.weight)
    x, z = normal(2, 5, 12), normal(2, 5, 12)
    gate = torch.sigmoid(z) if activation == "sigmoid" else functional.silu(z)
    h = (x if before else x * gate).unflatten(-1, (3, 4))
    h = (h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-3)).flatten(-2) * norm.weight
    torch.testing.assert_close(norm(x, z), h * gate if before else h)
    if activation == "swish":
        torch.testing.assert_close(vllm.rms_norm_gated(x, norm.weight, None, z, 1e-3, 4, before), norm(x, z))
    assert norm(x).shape == x.shape
    torch.testing.assert_close(vllm.l2norm_fwd(x), x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6))


def test_stochastic_rounding() -> None:
    """The mean of many draws is what would be stored unrounded."""
    rows = 4000
    value = torch.tensor(1.0 + 2**-12)
    state = torch.full((rows, 1, 1, 1), 1.0, dtype=torch.float16)
    one = torch.ones(rows, 1, 1)
    options: dict[str, Any] = {"D": torch.zeros(1, 1), "dt_bias": torch.zeros(1, 1), "out": torch.empty(rows, 1, 1)}
    zeros = torch.zeros(1, 1, 1)
    x = one * 2**-12
    vllm.selective_state_update(state, x, one, zeros, one, one, **options, enable_stochastic_rounding=True)
    assert set(state.unique().tolist()) == {1.0, 1.0 + 2**-10}
    torch.testing.assert_close(state.float().mean(), value, rtol=0, atol=6e-5)
