"""What fla has beside the plain gated delta rule: decays of channels, its short convolution, its norms."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamba_ops.compat import fla
from mamba_ops.compat.fla import convolution, delta_rule, index, kda, norms, padding
from mamba_ops.registry import use_backend
from tests.compat_inputs import GDN, compat, delta_rule_arguments, gdn_arguments


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # which alone takes float64
        yield


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# -- the delta rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("of", [("gk",), ("gv",), ("beta",), ("gk", "gv", "beta")])
def test_decays_of_channels(of: tuple[str, ...], v_first: bool) -> None:
    """As the recurrence says, and as the op where all channels are alike."""
    arguments: dict[str, Any] = gdn_arguments(torch.device("cpu"))
    own = {"gk": -normal(2, 9, 4, 4).exp(), "gv": -normal(2, 9, 4, 6).exp(), "beta": normal(2, 9, 4, 6).sigmoid()}
    arguments |= {name: own[name] for name in of}
    start = normal(2, 4, 6, 4) if v_first else normal(2, 4, 4, 6)
    options: dict[str, Any] = {"initial_state": start, "output_final_state": True, "state_v_first": v_first}
    out, last = fla.fused_recurrent_gated_delta_rule(**arguments, **options, use_qk_l2norm_in_kernel=True)
    q, k = (functional.normalize(arguments[n], dim=-1).repeat_interleave(2, 2) for n in "qk")
    state = start.mT if v_first else start
    zeros = torch.zeros((), dtype=torch.float64)
    beta = arguments["beta"] if arguments["beta"].dim() == 4 else arguments["beta"].unsqueeze(-1)
    for t in range(9):
        decay = arguments["g"][:, t, :, None, None]
        decay = decay + (arguments["gk"][:, t, :, :, None] if "gk" in of else zeros)
        decay = decay + (arguments["gv"][:, t, :, None, :] if "gv" in of else zeros)
        state = state * decay.exp()
        new = beta[:, t] * (arguments["v"][:, t] - (state * k[:, t, :, :, None]).sum(2))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        torch.testing.assert_close(out[:, t], (state * q[:, t, :, :, None]).sum(2) * 0.5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state.mT if v_first else state, rtol=1e-5, atol=1e-5)


def test_decays_of_channels_that_are_alike() -> None:
    arguments: dict[str, Any] = gdn_arguments(torch.device("cpu"))
    want = fla.fused_recurrent_gated_delta_rule(**arguments, output_final_state=True)
    gk = arguments.pop("g").unsqueeze(-1).expand(-1, -1, -1, 4)
    got = fla.fused_recurrent_gated_delta_rule(**arguments, gk=gk, output_final_state=True)
    torch.testing.assert_close(got, want)


def test_decays_of_channels_of_packed_sequences() -> None:
    """Tokens past the last one are of none."""
    arguments = {n: t.flatten(0, 1)[None] for n, t in gdn_arguments(torch.device("cpu")).items()}
    arguments["gv"] = -normal(1, 18, 4, 6).exp()
    ends = torch.tensor([0, 4, 4, 15])
    start = normal(3, 4, 4, 6)
    out, last = fla.fused_recurrent_gated_delta_rule(
        **arguments, cu_seqlens=ends, initial_state=start, output_final_state=True
    )
    for row, (begin, end) in enumerate(((0, 4), (4, 4), (4, 15))):
        part = {n: t[:, begin:end] for n, t in arguments.items()}
        alone, state = fla.fused_recurrent_gated_delta_rule(
            **part, initial_state=start[row : row + 1], output_final_state=True
        )
        torch.testing.assert_close(out[:, begin:end], alone)
        torch.testing.assert_close(last[row], state[0])
    assert not out[:, 15:].any()


@pytest.mark.parametrize("name", GDN)
def test_older_and_further_arguments(name: str) -> None:
    call, arguments = getattr(compat, name), gdn_arguments(torch.device("cpu"))
    want = call(**arguments, output_final_state=True, state_v_first=True)
    with pytest.warns(DeprecationWarning, match=f"^{name}: transpose_state_layout is deprecated; it is state_v_first"):
        got = call(**arguments, output_final_state=True, transpose_state_layout=True)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match=f"^{name}: transpose_state_layout: got it and state_v_first, expected the la"):
        call(**arguments, transpose_state_layout=True, state_v_first=True)
    unused = {"A_log": torch.randn(4), "dt_bias": torch.randn(4)}
    torch.testing.assert_close(call(**arguments, **unused)[0], want[0])
    if name == "chunk_gated_delta_rule":
        for chunk_size in (16, 32, 64):
            assert torch.equal(call(**arguments, chunk_size=chunk_size)[0], want[0])
    else:
        with pytest.raises(ValueError, match=f"^{name}: g: got None with use_gate_in_kernel, expected what goes"):
            call(**arguments | {"g": None}, use_gate_in_kernel=True, A_log=unused["A_log"])
        with pytest.raises(ValueError, match=f"^{name}: allow_neg_eigval: got True, expected it with use_beta_sigmoid"):
            call(**arguments | {"beta": None}, allow_neg_eigval=True)


def test_references_and_the_gate() -> None:
    arguments = gdn_arguments(torch.device("cpu"))
    want = fla.chunk_gated_delta_rule(**arguments, output_final_state=True)
    q, k, v, g, beta = arguments.values()
    torch.testing.assert_close(
        delta_rule.naive_recurrent_gated_delta_rule(q, k, v, beta, g, output_final_state=True), want
    )
    torch.testing.assert_close(
        delta_rule.naive_chunk_gated_delta_rule(q, k, v, g, beta, 16, output_final_state=True), want
    )
    A_log, dt_bias = normal(4), normal(4)
    gate = delta_rule.fused_gdn_gate(g, A_log, dt_bias, torch.float64)
    torch.testing.assert_close(gate, -A_log.exp() * functional.softplus(g + dt_bias))
    assert delta_rule.fused_gdn_gate(g, A_log).dtype == torch.float32


# -- the convolution --------------------------------------------------------------------------------------------------


def convolved(module: Any, x: Tensor, before: Tensor) -> Tensor:
    inputs = torch.cat((before[..., 1:], x.mT), -1)
    y = functional.conv1d(inputs, module.weight, module.bias, groups=6)
    return (y if module.activation is None else functional.silu(y)).mT


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_convolutions_go_on_from_states(activation: str | None, length: int) -> None:
    module = fla.ShortConvolution(6, 4, bias=True, activation=activation, dtype=torch.float64)
    x, before, residual = normal(2, length, 6), normal(2, 6, 4), normal(2, length, 6)
    want, last = convolved(module, x, before), torch.cat((before, x.mT), -1)[..., -4:]
    cache = before.clone()
    y, state = module(x, residual, cache=cache, output_final_state=True)
    torch.testing.assert_close(y, want + residual)
    torch.testing.assert_close(state, last)
    assert (state is cache) == (length == 1)  # in place where a sequence has one token
    assert torch.equal(cache, last if length == 1 else before)
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_(), before.clone().requires_grad_()]
        y, state = module(leaves[0], cache=leaves[1], output_final_state=True)
        torch.testing.assert_close((y, state), (want, last))
        assert torch.autograd.gradcheck(
            lambda a, b: module(a, cache=b, output_final_state=True), leaves, fast_mode=True
        )
    y, state = module(x)
    torch.testing.assert_close(y, convolved(module, x, torch.zeros_like(before)))
    assert state is None
    heads = convolution.causal_conv1d(x.unflatten(-1, (2, 3)), module.weight[:, 0], module.bias, activation=activation)
    torch.testing.assert_close(heads[0].flatten(2), y)


def test_short_convolutions_of_packed_sequences() -> None:
    module, x = fla.ShortConvolution(6, 4, dtype=torch.float64), normal(1, 12, 6)
    ends, before = torch.tensor([0, 7, 7, 9, 12]), normal(4, 6, 4)
    y, state = module(x, cache=before, output_final_state=True, cu_seqlens=ends)
    for row, (begin, end) in enumerate(((0, 7), (7, 7), (7, 9), (9, 12))):
        part = x[:, begin:end]
        if end > begin:
            torch.testing.assert_close(y[:, begin:end], convolved(module, part, before[row : row + 1]))
        torch.testing.assert_close(state[row], torch.cat((before[row], part[0].T), -1)[:, -4:])
    idx = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 3]))[None]
    torch.testing.assert_close(module(x, seq_idx=idx)[0], module(x, cu_seqlens=ends)[0])
    _, state = module(x, output_final_state=True, cu_seqlens=ends)
    assert not state[1].any()
    token, cache = normal(1, 4, 6), before.clone()
    y, state = module(token, cache=cache, output_final_state=True, cu_seqlens=torch.arange(5))
    assert state is cache
    torch.testing.assert_close(y.mT, convolved(module, token.transpose(0, 1), before).transpose(0, 1).mT)


def test_short_convolutions_mask_padding() -> None:
    module, x = fla.ShortConvolution(6, 4, dtype=torch.float64), normal(2, 5, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    given = x.clone()
    torch.testing.assert_close(module(x, mask=mask)[0][0, 2:], module(x[:1, 2:])[0][0])
    assert torch.equal(x, given)
    with pytest.raises(ValueError, match="ShortConvolution: mask: got it with cu_seqlens, expected one of the two"):
        module(x[:1], mask=mask[:1], cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="ShortConvolution: activation: got 'gelu', expected None, 'silu' or 'swish'"):
        fla.ShortConvolution(6, 4, activation="gelu")
    with pytest.raises(ValueError, match="causal_conv1d: weight: got None, expected a tensor"):
        convolution.causal_conv1d(x)
    with pytest.raises(
        ValueError, match=r"causal_conv1d_update: x: got shape \(2, 5, 6\), expected one token for each"
    ):
        convolution.causal_conv1d_update(x, normal(2, 6, 4), None, module.weight[:, 0])
    assert module.state_size == 24
    assert "activation=silu" in repr(module)


# -- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["swish", "sigmoid"])
@pytest.mark.parametrize("kind", [norms.FusedLayerNormGated, fla.FusedRMSNormGated])
def test_gated_norms(kind: Any, activation: str) -> None:
    module = kind(6, activation=activation, dtype=torch.float64)
    torch.nn.init.normal_(module.weight)
    x, g, residual = normal(2, 5, 6), normal(2, 5, 6), normal(2, 5, 6)
    gate = torch.sigmoid(g) if activation == "sigmoid" else functional.silu(g)
    h = x + residual
    h = h - (h.mean(-1, keepdim=True) if kind is norms.FusedLayerNormGated else 0)
    want = h / torch.sqrt(h.square().mean(-1, keepdim=True) + 1e-5) * module.weight * gate
    torch.testing.assert_close(module(x, g, residual, True), (want, x + residual))
    torch.testing.assert_close(module(x + residual, g.flatten(0, 1)), want)
    assert module(x.float(), g.float(), prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    with pytest.raises(ValueError, match=f"{kind.__name__}: activation: got 'gelu', expected 'swish', 'silu', 'sigm"):
        kind(6, activation="gelu")
    assert kind(6, elementwise_affine=False)(x, g).shape == x.shape


def test_plain_norms() -> None:
    x, residual = normal(2, 5, 6), normal(2, 5, 6)
    torch.testing.assert_close(fla.l2norm(x, 1e-3), x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-3))
    assert norms.L2Norm(output_dtype=torch.float32)(x).dtype == torch.float32
    for module in (fla.RMSNorm(6, bias=True, dtype=torch.float64), fla.RMSNorm(6, elementwise_affine=False)):
        y, total = module(x, residual, prenorm=True)
        torch.testing.assert_close(total, x + residual)
        torch.testing.assert_close(y, functional.rms_norm(total, (6,), eps=1e-5))


# -- packed sequences -------------------------------------------------------------------------------------------------


def test_indices_of_packed_sequences() -> None:
    ends = torch.tensor([0, 5, 7, 7, 8])
    assert index.prepare_lens(ends).tolist() == [5, 2, 0, 1]
    assert torch.equal(index.prepare_cu_seqlens_from_lens(index.prepare_lens(ends), torch.int64), ends)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert index.prepare_cu_seqlens_from_mask(mask).tolist() == [0, 2, 3]
    assert index.prepare_lens_from_mask(mask).dtype == torch.int32
    assert index.prepare_position_ids(ends).tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert index.prepare_position_ids(ends, ends).dtype == ends.dtype
    assert index.prepare_sequence_ids(ends).tolist() == [0, 0, 0, 0, 0, 1, 1, 2]
    assert index.prepare_token_indices(ends)[5].tolist() == [1, 0]
    assert index.prepare_chunk_indices(ends, 2).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [3, 0]]
    assert index.prepare_chunk_offsets(ends, 2).tolist() == [0, 3, 4, 4, 5]
    assert index.tensor_cache(index.prepare_lens) is index.prepare_lens
    rows, offsets = index.prepare_chunk_indices_static(ends, 2, 7)
    assert rows.tolist() == [*index.prepare_chunk_indices(ends, 2).tolist(), [-1, 0], [-1, 0]]
    assert offsets.tolist() == [0, 3, 4, 4, 5]
    assert index.get_max_num_splits(ends, 2) == index.get_max_num_splits(ends, 2, ends) == 3
    assert index.prepare_split_cu_seqlens(split_size=2, cu_seqlens=ends).tolist() == [0, 2, 4, 5, 7, 8]
    assert index.prepare_split_cu_seqlens(2, 5, 3, dtype=torch.int64).tolist() == [0, 3, 5, 8, 10]
    with pytest.raises(TypeError, match="prepare_split_cu_seqlens: cu_seqlens: got None, expected a tensor, or batch"):
        index.prepare_split_cu_seqlens(split_size=2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda ends: index.prepare_split_cu_seqlens(cu_seqlens=ends),
            "prepare_split_cu_seqlens: split_size: got None",
        ),
        (lambda ends: index.prepare_chunk_indices(ends, 0), "prepare_chunk_indices: chunk_size: got 0"),
        (lambda ends: index.prepare_chunk_offsets(ends, -1), "prepare_chunk_offsets: chunk_size: got -1"),
        (lambda ends: index.prepare_chunk_indices_static(ends, 2, -1), "prepare_chunk_indices_static: nt_max: got -1"),
        (lambda ends: index.get_max_num_splits(ends, 0), "get_max_num_splits: chunk_size: got 0"),
        (lambda ends: index.prepare_position_ids(ends[0]), "prepare_position_ids: cu_seqlens: got"),
        (lambda ends: index.pack_sequence(None, ends), "pack_sequence: x: got None"),
        (lambda ends: index.unpack_sequence(ends.float(), ends), "unpack_sequence: x, cu_seqlens: got"),
        (lambda ends: padding.get_unpad_data(None), "prepare_lens_from_mask: mask: got None"),
        (lambda ends: padding.pad_input(torch.zeros(5, 2), ends, 2, 0), "pad_input: seq_len: got 0"),
    ],
)
def test_what_is_no_packing_is_refused(call: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^(prepare_lens: |){says}"):
        call(torch.tensor([0, 5, 7, 7, 8]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_and_comes_back(side: str) -> None:
    ends, rows = torch.tensor([0, 3, 3, 5]), torch.randn(3, 4, 2, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    mask = mask.flip(1) if side == "left" else mask
    rows = (rows * mask.unsqueeze(-1)).requires_grad_()
    packed = index.pack_sequence(rows, ends, side)
    assert torch.equal(packed, rows[mask.bool()])
    assert torch.equal(index.unpack_sequence(packed, ends, side, rows.shape), rows)
    assert index.unpack_sequence(packed, ends, side).shape == (3, 3, 2)
    with torch.enable_grad():
        assert torch.autograd.gradcheck(lambda x: index.unpack_sequence(index.pack_sequence(x, ends, side), ends), rows)
    with pytest.raises(ValueError, match="padding_side: got 'top', expected 'left' or 'right'"):
        index.pack_sequence(rows, ends, "top")
    indices, ends_of_mask, longest = padding.get_unpad_data(mask)
    assert (ends_of_mask.tolist(), longest) == ([0, 3, 3, 5], 3)
    assert torch.equal(padding.index_first_axis(rows.flatten(0, 1), indices), packed)
    assert torch.equal(padding.pad_input(packed, indices, 3, 4), rows)
    q, (k,), _, both, _ = padding.unpad_input(rows, (rows,), mask, 4, keepdim=True)
    assert torch.equal(q, k)
    assert q.shape == (1, 5, 2)
    assert both[0] is both[1]
    q, (k,), places, (q_ends, _), lengths = padding.unpad_input(rows[:, :1], (rows,), mask, 1)
    assert (q.shape, places.tolist(), q_ends.tolist(), lengths) == ((3, 2), [0, 1, 2], [0, 1, 2, 3], (1, 3))
    with pytest.raises(NotImplementedError, match="unpad_input: q_len: got 2, expected 4"):
        padding.unpad_input(rows[:, :2], (rows,), mask, 2)
    with pytest.raises(ValueError, match="index_first_axis: x: got shape"):
        padding.index_first_axis(indices, indices)


def test_states_of_a_layer_are_found_by_its_number() -> None:
    class Cache(list):  # type: ignore[type-arg]
        def update(self, layer_idx: int, **states: Any) -> None:
            self.append((layer_idx, states))

    layer, cache = nn.Linear(1, 1), Cache()
    assert padding.get_layer_cache(layer, None) is None
    with pytest.raises(ValueError, match="Linear: layer_idx: got None, expected a number"):
        padding.get_layer_cache(layer, cache)
    layer.layer_idx = 0
    assert padding.get_layer_cache(layer, cache) is None
    assert padding.update_layer_cache(layer, cache, state=1) is cache
    assert padding.get_layer_cache(layer, cache) == (0, {"state": 1})


def test_mamba2s_norm_of_fla_has_the_gate_first() -> None:
    norm, (x, z) = norms.RMSNormGated(8, group_size=4), torch.randn(2, 3, 8)
    gated = (x * functional.silu(z)).unflatten(-1, (2, 4))
    torch.testing.assert_close(norm(x, z), functional.rms_norm(gated, (4,), eps=1e-5).flatten(-2))


# -- Kimi Delta Attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chunk_kda", "fused_recurrent_kda"])
def test_kda_is_the_recurrence(name: str) -> None:
    arguments = delta_rule_arguments(name, torch.device("cpu"))
    start = normal(2, 4, 4, 6)
    out, last = getattr(fla, name)(
        **arguments, scale=0.3, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    q, k = (functional.normalize(arguments[n], dim=-1).repeat_interleave(2, 2) for n in "qk")
    state = start
    for t in range(9):
        state = state * arguments["g"][:, t].exp().unsqueeze(-1)
        new = arguments["beta"][:, t, :, None] * (arguments["v"][:, t] - (state * k[:, t, :, :, None]).sum(2))
        state = state + k[:, t, :, :, None] * new[:, :, None]
        torch.testing.assert_close(out[:, t], (state * q[:, t, :, :, None]).sum(2) * 0.3, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", [{"A_log"}, {"A_log", "dt_bias"}, {"lower_bound"}, {"A_log", "dt_bias", "lower_bound"}])
def test_kda_with_its_gate_in_the_kernel(of: set[str]) -> None:
    """A lower bound alone makes another gate, with safe_gate or without."""
    arguments = delta_rule_arguments("chunk_kda", torch.device("cpu")) | {"g": normal(2, 9, 4, 4)}
    given: dict[str, Any] = {"A_log": normal(4), "dt_bias": normal(16), "lower_bound": -5.0}
    d = arguments["g"] + (given["dt_bias"].view(4, 4) if "dt_bias" in of else 0)
    rate = given["A_log"].exp().unsqueeze(-1) if "A_log" in of else torch.ones(4, 1, dtype=torch.float64)
    g = -5 * torch.sigmoid(rate * d) if "lower_bound" in of else -rate * functional.softplus(d)
    raw = {n: value for n, value in given.items() if n in of}
    want = fla.chunk_kda(**arguments | {"g": g})[0]
    for call in (fla.chunk_kda, fla.fused_recurrent_kda):
        torch.testing.assert_close(call(**arguments, **raw, use_gate_in_kernel=True)[0], want)
    torch.testing.assert_close(kda.fused_kda_gate(arguments["g"], **raw, output_dtype=torch.float64), g)
    naive = kda.naive_kda_lowerbound_gate if "lower_bound" in of else kda.naive_kda_gate
    torch.testing.assert_close(naive(arguments["g"], **raw, output_dtype=torch.float64), g)
    if "lower_bound" in of:
        torch.testing.assert_close(fla.chunk_kda(**arguments, **raw, use_gate_in_kernel=True, safe_gate=True)[0], want)


def test_kda_refuses_what_its_gate_needs() -> None:
    arguments = delta_rule_arguments("chunk_kda", torch.device("cpu"))
    for options, expected in (
        ({"use_gate_in_kernel": True}, "A_log: got None with use_gate_in_kernel, expected a tensor"),
        ({"use_gate_in_kernel": True, "lower_bound": 0.5}, "lower_bound: got 0.5, expected a number below 0"),
        ({"use_gate_in_kernel": True, "lower_bound": -7.0, "safe_gate": True}, "lower_bound: got -7.0, expected -5"),
        ({"use_gate_in_kernel": True, "A_log": normal(3)}, "A_log: got shape .3,., expected 4 numbers"),
        (
            {"use_gate_in_kernel": True, "A_log": normal(4), "dt_bias": normal(4)},
            "dt_bias: got shape .4,., expected 16",
        ),
        ({"allow_neg_eigval": True}, "allow_neg_eigval: got True, expected it with use_beta_sigmoid"),
        ({"chunk_size": 16}, "chunk_size: got 16, expected 32 or 64"),
        ({"return_intermediate_states": True}, "return_intermediate_states: got a bool, expected none"),
    ):
        with pytest.raises(ValueError, match=f"^chunk_kda: {expected}"):
            fla.chunk_kda(**arguments, **options)


def test_kda_of_torch_and_its_gradients() -> None:
    arguments = delta_rule_arguments("chunk_kda", torch.device("cpu"))
    want = fla.chunk_kda(**arguments)[0]
    assert torch.equal(kda.naive_recurrent_kda(**arguments)[0], want)
    assert torch.equal(kda.naive_chunk_kda(**arguments)[0], want)
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
    with torch.enable_grad():
        out, last = fla.chunk_kda(**leaves, output_final_state=True)
        assert last is not None
        gradients = torch.autograd.grad(out.sum() + last.sum(), list(leaves.values()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
