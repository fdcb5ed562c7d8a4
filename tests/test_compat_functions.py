"""The functions of mamba_ssm, causal_conv1d and fla over our ops: their parameters are honoured or refused."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.layers import gated_rms_norm
from mamba_ops.registry import use_backend
from tests.compat_inputs import (
    DELTA_RULES,
    compat,
    conv_arguments,
    delta_rule_arguments,
    good_arguments,
    scan_arguments,
)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with torch.no_grad(), use_backend("torch"):  # which alone takes float64
        yield


ORIGINALS = {  # the parameters of mamba_ssm 2.3.2, causal_conv1d 1.6.1 and fla-core 0.6.0
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens conv_state_indices",
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context",
    "fused_recurrent_gated_delta_rule": "q k v g gk gv beta scale initial_state output_final_state "
    "use_qk_l2norm_in_kernel use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval "
    "state_v_first cu_seqlens",
    "chunk_kda": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
    "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute return_intermediate_states "
    "state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs",
    "fused_recurrent_kda": "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens",
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus "
    "dt_limit return_final_states return_varlen_states",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states "
    "seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps outproj_weight outproj_bias headdim "
    "ngroups norm_before_gate",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus state_batch_indices",
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_parameter_of_the_original_has_its_name_and_place(name: str) -> None:
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ORIGINALS[name].split()


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_conv_goes_on_from_initial_states(device: torch.device, activation: str | None) -> None:
    x, weight, bias = conv_arguments(device)
    expected = functional.conv1d(x, weight.unsqueeze(1), bias, padding=3, groups=12)[..., :7]
    expected = expected if activation is None else functional.silu(expected)
    torch.testing.assert_close(compat.causal_conv1d_fn(x, weight, bias, activation=activation), expected)
    first, states = compat.causal_conv1d_fn(x[..., :2], weight, bias, return_final_states=True, activation=activation)
    torch.testing.assert_close(states, functional.pad(x[..., :2], (1, 0)))
    given, kept = states.clone(), torch.full_like(states, torch.nan)
    rest, last = compat.causal_conv1d_fn(
        x[..., 2:], weight, bias, None, states, True, final_states_out=kept, activation=activation
    )
    torch.testing.assert_close(torch.cat([first, rest], dim=-1), expected)
    assert torch.equal(states, given)
    assert last is kept
    assert torch.equal(last, x[..., -3:])
    only = compat.causal_conv1d_fn(x[..., 2:], weight, bias, initial_states=states, activation=activation)
    assert torch.equal(only, rest)


def test_conv_update_refuses_a_state_that_is_too_short(device: torch.device) -> None:
    x, weight, bias = conv_arguments(device, 1)
    for state_len in (0, 2):
        state = x.new_zeros(2, 12, state_len)
        with pytest.raises(ValueError, match=f"conv_state: got state_len {state_len}, expected at least 3"):
            compat.causal_conv1d_update(x, state, weight, bias)
    for width in (0, 1):
        state = x.new_zeros(2, 12, 3)
        with pytest.raises(ValueError, match=f"weight: got width {width}, expected a width of 2 to 8"):
            compat.causal_conv1d_update(x, state, weight[:, :width], bias)
        assert not state.any()


@pytest.mark.parametrize("state_len", [3, 4, 6])
@pytest.mark.parametrize("tokens", [1, 2])
def test_conv_update_keeps_the_last_inputs_last(device: torch.device, state_len: int, tokens: int) -> None:
    x, weight, bias = conv_arguments(device, tokens)
    state = torch.randn(2, 12, state_len, device=device, dtype=torch.float64)
    inputs = torch.cat([state, x], dim=-1)
    expected = functional.conv1d(inputs, weight.unsqueeze(1), bias, groups=12)[..., -tokens:]
    cache = state.clone()
    torch.testing.assert_close(compat.causal_conv1d_update(x, cache, weight, bias), expected)
    assert torch.equal(cache, inputs[..., -state_len:])
    if tokens == 1:
        slots = torch.tensor([2, -1], dtype=torch.int32, device=device)
        cache = torch.stack([state[1], state[1], state[0]])
        out = compat.causal_conv1d_update(x[..., 0], cache, weight, bias, conv_state_indices=slots)
        torch.testing.assert_close(out[0], expected[0, :, 0])
        assert not out[1].any()
        assert torch.equal(cache, torch.stack([state[1], state[1], inputs[0, :, -state_len:]]))


def test_what_is_expanded_goes_to_the_op_by_head(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = scan_arguments(device, 1)
    x, dt, B, C = (arguments[name][:, 0] for name in ("x", "dt", "B", "C"))
    per_head = {"dt": dt, **{name: arguments[name] for name in ("A", "D", "dt_bias")}}
    shapes = {"dt": (2, 4, 8), "A": (4, 8, 16), "D": (4, 8), "dt_bias": (4, 8)}
    expanded = {
        name: t.view(*t.shape, *[1] * (len(shapes[name]) - t.dim())).expand(shapes[name])
        for name, t in per_head.items()
    }
    full = {name: t.contiguous() for name, t in expanded.items()}
    state = torch.randn(3, 4, 8, 16, device=device, dtype=torch.float64)
    op, seen, results = compat.ops.selective_state_update, [], []

    def spy(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> Tensor:
        seen.append({"dt": dt.shape, "A": A.shape, "D": rest["D"].shape, "dt_bias": rest["dt_bias"].shape})
        return op(state, x, dt, A, B, C, **rest)

    monkeypatch.setattr(compat.ops, "selective_state_update", spy)
    for given in (expanded, full):
        cache, slots = state.clone(), torch.tensor([2, 0], device=device)
        options = {"z": x, "dt_softplus": True, "state_batch_indices": slots}
        results.append((compat.selective_state_update(cache, x, B=B, C=C, **given, **options), cache))
    assert seen == [{name: t.shape for name, t in tensors.items()} for tensors in (per_head, full)]
    torch.testing.assert_close(*results)
    assert torch.equal(results[0][1][1], state[1])  # nobody's slot


def test_state_update_without_heads(device: torch.device) -> None:
    arguments = scan_arguments(device, 1)
    x, B, C = (arguments[name][:, 0, 0] for name in ("x", "B", "C"))
    A, D = -torch.rand(8, 16, device=device, dtype=torch.float64), x[0]
    states = torch.randn(2, 8, 16, device=device, dtype=torch.float64)
    dt = arguments["dt"][:, 0, :1].abs().expand(2, 8)
    expected = states * torch.exp(A * dt[..., None]) + B[:, None] * (dt * x)[..., None]
    out = compat.selective_state_update(states, x, dt, A, B, C, D)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(out, (expected * C[:, None]).sum(-1) + D * x)


def test_scan_goes_on_from_initial_states(device: torch.device) -> None:
    arguments = scan_arguments(device)
    parts = [
        {name: t[:, part] if t.dim() > 1 else t for name, t in arguments.items()}
        for part in (slice(None, 8), slice(8, None))
    ]
    options: dict[str, Any] = {"chunk_size": 4, "dt_softplus": True, "dt_limit": (0.1, 0.9)}
    whole, state = compat.mamba_chunk_scan_combined(**arguments, **options, return_final_states=True)
    first, middle = compat.mamba_chunk_scan_combined(**parts[0], **options, return_final_states=True)
    given = middle.clone()
    rest, last = compat.mamba_chunk_scan_combined(
        **parts[1], **options, initial_states=middle, return_final_states=True
    )
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(last, state)
    assert torch.equal(middle, given)
    assert torch.equal(compat.mamba_chunk_scan_combined(**arguments, **options), whole)
    limited = functional.softplus(arguments["dt"] + arguments["dt_bias"]).clamp(*options.pop("dt_limit"))
    z, skip = torch.randn_like(arguments["x"]), arguments["D"].unsqueeze(1).expand(4, 8)
    plain = {**arguments, "dt": limited, "dt_bias": None, "D": skip, "z": z, "chunk_size": 4}
    torch.testing.assert_close(compat.mamba_chunk_scan_combined(**plain), whole * functional.silu(z))
    low = {name: t.bfloat16() for name, t in arguments.items()}
    out, state = compat.mamba_chunk_scan_combined(**low, **options, return_final_states=True)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("norm", ["none", "before the gate", "after the gate"])
def test_the_fused_function_is_its_parts(device: torch.device, norm: str) -> None:
    arguments = scan_arguments(device)
    x, _, _ = (arguments.pop(name) for name in ("x", "B", "C"))
    dt, inner, conv_dim = arguments.pop("dt"), 32, 32 + 2 * 2 * 16
    gate, mixed = (torch.randn(2, 21, size, device=device, dtype=torch.float64) for size in (inner, conv_dim))
    weight, out_weight, norm_weight = (
        torch.randn(shape, device=device, dtype=torch.float64) for shape in ((conv_dim, 4), (24, inner), (inner,))
    )
    convolved = compat.causal_conv1d_fn(mixed.transpose(1, 2), weight, activation="silu").transpose(1, 2)
    x, B, C = convolved.split([inner, 32, 32], dim=-1)
    scan = {"x": x.unflatten(-1, (4, 8)), "B": B.unflatten(-1, (2, 16)), "C": C.unflatten(-1, (2, 16)), "dt": dt}
    z = gate.unflatten(-1, (4, 8)) if norm == "none" else None
    options: dict[str, Any] = {"chunk_size": 16, "return_final_states": True}
    y, state = compat.mamba_chunk_scan_combined(**scan, **arguments, z=z, dt_softplus=True, **options)
    y = y.flatten(-2)
    if norm != "none":
        first = norm == "before the gate"
        options |= {"rmsnorm_weight": norm_weight, "rmsnorm_eps": 1e-3, "norm_before_gate": first}
        y = gated_rms_norm(y, gate, norm_weight, groups=2, eps=1e-3, norm_before_gate=first)
    zxbcdt = torch.cat([gate, mixed, dt], dim=-1)
    last = {"outproj_weight": out_weight, "outproj_bias": out_weight[:, 0]}
    fused, fused_state = compat.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, None, **arguments, **options, **last, headdim=8, ngroups=2
    )
    torch.testing.assert_close(fused, y @ out_weight.t() + out_weight[:, 0])
    torch.testing.assert_close(fused_state, state)
    options |= {"return_final_states": False, "ngroups": 2}
    arguments["D"] = arguments["D"].unsqueeze(1).repeat(1, 8)  # then D tells the size of a head
    torch.testing.assert_close(compat.mamba_split_conv1d_scan_combined(zxbcdt, weight, None, **arguments, **options), y)


@pytest.mark.parametrize("groups", [None, 2])
def test_selective_scan_is_the_recurrence(device: torch.device, groups: int | None) -> None:
    batch, dim, dstate, length = 2, 6, 4, 9
    u, delta, z = (torch.randn(batch, dim, length, device=device, dtype=torch.float64) for _ in range(3))
    A, D = -torch.rand(dim, dstate, device=device, dtype=torch.float64), torch.randn(dim, device=device).double()
    sizes = (batch, dstate, length) if groups is None else (batch, groups, dstate, length)
    B, C = (torch.randn(sizes, device=device, dtype=torch.float64) for _ in range(2))
    options = {"D": D, "z": z, "delta_bias": D, "delta_softplus": True}
    out, last = compat.selective_scan_fn(u, delta, A, B, C, **options, return_last_state=True)
    b, c = (t.unsqueeze(1) if groups is None else t for t in (B, C))
    b, c = (t.repeat_interleave(dim // t.shape[1], dim=1) for t in (b, c))
    state, d = torch.zeros_like(last), functional.softplus(delta + D[:, None])
    for t in range(length):
        step = d[:, :, t, None]
        state = state * torch.exp(A * step) + step * b[..., t] * u[:, :, t, None]
        y = (state * c[..., t]).sum(-1) + D * u[..., t]
        torch.testing.assert_close(out[..., t], y * functional.silu(z[..., t]))
    torch.testing.assert_close(last, state)
    assert torch.equal(compat.selective_scan_fn(u, delta, A, B, C, **options), out)


@pytest.mark.parametrize("name", DELTA_RULES)
@pytest.mark.parametrize("v_first", [False, True])
def test_delta_rule_goes_on_from_initial_states(device: torch.device, name: str, v_first: bool) -> None:
    call, arguments = getattr(compat, name), delta_rule_arguments(name, device)
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True, "state_v_first": v_first}
    whole, last = call(**arguments, **options)
    assert last.shape == ((2, 4, 6, 4) if v_first else (2, 4, 4, 6))
    first, middle = call(**{n: t[:, :4] for n, t in arguments.items()}, **options)
    kept = middle.clone()
    rest, end = call(**{n: t[:, 4:] for n, t in arguments.items()}, **options, initial_state=middle)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    torch.testing.assert_close(end, last)
    assert torch.equal(middle, kept)
    assert call(**arguments)[1] is None


@pytest.mark.parametrize("name", DELTA_RULES)
def test_delta_rule_with_what_its_kernels_can_fuse(device: torch.device, name: str) -> None:
    call, arguments = getattr(compat, name), delta_rule_arguments(name, device)
    raw = {"g": torch.randn_like(arguments["g"]), "beta": torch.randn_like(arguments["beta"])}
    heads, rates = raw["g"].shape[2:], torch.randn(4, device=device).double()
    weights = {"A_log": rates, "dt_bias": torch.randn(heads.numel(), device=device).double()}
    done = {
        "g": -rates.exp().view(-1, *[1] * (len(heads) - 1))
        * functional.softplus(raw["g"] + weights["dt_bias"].view(heads)),
        "beta": 2 * raw["beta"].sigmoid(),
    }
    fused = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    got, _ = call(**arguments | raw, **weights, **fused)
    torch.testing.assert_close(got, call(**arguments | done)[0])


@pytest.mark.parametrize("name", DELTA_RULES)
def test_delta_rule_keeps_packed_sequences_apart(device: torch.device, name: str) -> None:
    call, arguments = getattr(compat, name), delta_rule_arguments(name, device)
    ends = torch.tensor([0, 9, 18], device=device)
    packed = {n: t.flatten(0, 1).unsqueeze(0) for n, t in arguments.items()}
    out, last = call(**packed, cu_seqlens=ends, output_final_state=True)
    expected, state = call(**arguments, output_final_state=True)
    torch.testing.assert_close(out.view_as(expected), expected)
    torch.testing.assert_close(last, state)
    with pytest.raises(ValueError, match=f"^{name}: q: got a batch of 2, expected 1: with cu_seqlens"):
        call(**arguments, cu_seqlens=ends)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        ("causal_conv1d_fn", "activation"),
        ("causal_conv1d_fn", "cu_seqlens"),
        ("causal_conv1d_fn", "final_states_out"),
        ("causal_conv1d_fn", "seq_idx"),
        ("causal_conv1d_update", "activation"),
        ("causal_conv1d_update", "cache_seqlens"),
        ("chunk_gated_delta_rule", "allow_neg_eigval"),
        ("chunk_gated_delta_rule", "chunk_size"),
        ("chunk_gated_delta_rule", "cp_context"),
        ("fused_recurrent_gated_delta_rule", "allow_neg_eigval"),
        ("selective_scan_fn", "B"),
        ("selective_scan_fn", "cu_seqlens"),
        ("mamba_chunk_scan_combined", "cu_seqlens"),
        ("mamba_chunk_scan_combined", "position_ids"),
        ("mamba_chunk_scan_combined", "return_varlen_states"),
        ("mamba_chunk_scan_combined", "seq_idx"),
        ("mamba_split_conv1d_scan_combined", "activation"),
        ("mamba_split_conv1d_scan_combined", "headdim"),
        ("mamba_split_conv1d_scan_combined", "seq_idx"),
        ("mamba_split_conv1d_scan_combined", "zxbcdt"),
        ("selective_state_update", "seq_idx"),
    ],
)
def test_what_cannot_be_honoured_is_refused(device: torch.device, function: str, argument: str) -> None:
    call, arguments = getattr(compat, function), good_arguments(function, device)
    call(**arguments)
    bad = {"activation": "gelu", "headdim": None, "return_varlen_states": True, "zxbcdt": torch.zeros(2, 7, 131)}
    bad |= {"allow_neg_eigval": True, "chunk_size": 24}
    bad["seq_idx"] = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{function}: {argument}: got .*, expected "):
        call(**{**arguments, argument: bad.get(argument, torch.zeros(2, 7, dtype=torch.int32, device=device))})
