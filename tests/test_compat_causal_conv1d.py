"""What causal_conv1d has beside a plain convolution: long and circular states, states of packed rows, its C++ names."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mamba_ops.compat import causal_conv1d
from mamba_ops.registry import use_backend
from tests.compat_inputs import compat, conv_arguments


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with use_backend("torch"):  # which alone takes float64
        yield


def convolved(inputs: Tensor, weight: Tensor, bias: Tensor, tokens: int) -> Tensor:
    return functional.silu(functional.conv1d(inputs, weight.unsqueeze(1), bias, groups=12)[..., -tokens:])


@pytest.mark.parametrize("tokens", [1, 3, 11])
@pytest.mark.parametrize("state_len", [3, 4, 8, 9])
@pytest.mark.parametrize("circular", [False, True])
def test_states_of_any_length(device: torch.device, state_len: int, tokens: int, circular: bool) -> None:
    """Row by row, column by column, as the documentation has it."""
    x, weight, bias = conv_arguments(device, tokens)
    before = torch.randn(2, 12, state_len, device=device, dtype=torch.float64)
    state, seen = before.clone(), torch.tensor([2, 13], dtype=torch.int32, device=device)
    want_state, past = before.clone(), before[..., -3:]
    if circular:
        past = torch.stack([before[row][:, [(int(seen[row]) - 3 + i) % state_len for i in range(3)]] for row in (0, 1)])
        for row in (0, 1):
            for token in range(tokens):
                want_state[row, :, (int(seen[row]) + token) % state_len] = x[row, :, token]
    else:
        want_state = torch.cat([before, x], -1)[..., -state_len:]
    options = {"cache_seqlens": seen} if circular else {}
    out = compat.causal_conv1d_update(x, state, weight, bias, "silu", **options)
    torch.testing.assert_close(out, convolved(torch.cat([past, x], -1), weight, bias, tokens))
    assert torch.equal(state, want_state)


def test_inputs_before_the_window_reach_no_output(device: torch.device) -> None:
    """Whatever they are: mamba_ssm's and Transformers' caches have a column more than a window needs."""
    x, weight, bias = conv_arguments(device, 1)
    state = torch.randn(2, 12, 4, device=device, dtype=torch.float64)
    state[..., 0] = torch.nan
    before = state.clone()
    with torch.no_grad():
        out = compat.causal_conv1d_update(x, state, weight, bias, "silu")
    torch.testing.assert_close(out, convolved(torch.cat([before[..., 1:], x], -1), weight, bias, 1))
    assert torch.equal(state, torch.cat([before[..., 1:], x], -1))


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_slots_of_long_states(device: torch.device, circular: bool) -> None:
    """Padding rows give zeros and touch nothing, in one graph too."""
    x, weight, bias = conv_arguments(device, 1)
    x = torch.cat([x, x + 1])[..., 0]
    before = torch.randn(5, 12, 10, device=device, dtype=torch.float64)
    slots = torch.tensor([3, -1, 0, -1], dtype=torch.int32, device=device)
    seen = torch.tensor([4, 0, 25, 7], device=device) if circular else None

    def step(state: Tensor) -> Tensor:
        return compat.causal_conv1d_update(x, state, weight, bias, "silu", seen, slots)

    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with torch.no_grad():
            state = before.clone()
            out = call(state)
        assert not out[[1, 3]].any()
        for row in (0, 2):
            alone = before[slots[row]][None].clone()
            one = None if seen is None else seen[row : row + 1]
            want = compat.causal_conv1d_update(x[row : row + 1], alone, weight, bias, "silu", one)
            torch.testing.assert_close(out[row], want[0])
            assert torch.equal(state[slots[row]], alone[0])
        assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("conv_state_indices", torch.tensor([0, 7]), "conv_state_indices: got 7 in row 1"),
        ("conv_state_indices", torch.tensor([0.0, 1.0]), "conv_state_indices: "),
        ("cache_seqlens", torch.tensor([1, 2, 3]), "cache_seqlens: "),
        ("cache_seqlens", torch.tensor([1.0, 2.0]), "cache_seqlens: got torch.float32, expected int32 or int64"),
        ("conv_state", torch.zeros(1, 12, 10), "conv_state: got 1 slots, expected at least 2"),
        ("conv_state", torch.zeros(2, 11, 10), "conv_state: "),
        ("conv_state", torch.zeros(1, 12, 10).expand(2, 12, 10), "conv_state: "),
    ],
)
def test_wrong_calls_on_long_states_write_nothing(name: str, value: Tensor, error: str) -> None:
    """On the CPU, where values are read, too."""
    x, weight, bias = conv_arguments(torch.device("cpu"), 1)
    state = torch.zeros(2, 12, 10)
    arguments: dict[str, Any] = {"x": x, "conv_state": state, "weight": weight, "bias": bias, name: value}
    with torch.no_grad(), pytest.raises(ValueError, match=f"^causal_conv1d_update: {error}"):
        compat.causal_conv1d_update(**arguments)
    assert not arguments["conv_state"].any()


@pytest.mark.parametrize("state_len", [1, 3, 6])
def test_states_of_packed_rows(device: torch.device, state_len: int) -> None:
    x = torch.randn(9, 12, device=device)
    states = compat.causal_conv1d_varlen_states(x, torch.tensor([0, 4, 4, 9], device=device), state_len)
    rows = [x[:4], x[4:4], x[4:]]
    want = [functional.pad(row.t(), (state_len, 0))[:, -state_len:] for row in rows]
    assert torch.equal(states, torch.stack(want))


def test_states_are_no_longer_than_memory(device: torch.device) -> None:
    x, bounds = torch.ones(6, 8, device=device), torch.tensor([0, 4, 6], device=device)
    with pytest.raises(ValueError, match=r"^causal_conv1d_varlen_states: state_len: got 2147483648"):
        causal_conv1d.causal_conv1d_varlen_states(x, bounds, 2**31)


def test_the_names_of_its_extension(device: torch.device) -> None:
    x, weight, bias = conv_arguments(device)
    states, final = torch.randn(2, 12, 3, device=device).double(), torch.zeros(2, 12, 3, device=device).double()
    out = causal_conv1d.causal_conv1d_fwd_function(x, weight, bias, None, states, final, True)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, states)]
    own, own_final = compat.causal_conv1d_fn(*leaves[:3], None, leaves[3], True, activation="silu")
    torch.testing.assert_close(out, own)
    torch.testing.assert_close(final, own_final)
    grads = torch.randn_like(out), torch.randn_like(final)
    want = torch.autograd.grad((own, own_final), leaves, grads)
    place = torch.zeros_like(x)
    got = causal_conv1d.causal_conv1d_bwd_function(x, weight, bias, grads[0], None, states, grads[1], place, True, True)
    torch.testing.assert_close(got, want)
    assert got[0] is place
    *_, none = causal_conv1d.causal_conv1d_bwd_function(x, weight, None, grads[0], None, None, None, None, False, False)
    assert none is None
    cache = states.clone()
    step = causal_conv1d.causal_conv1d_update_function(x, cache, weight, bias, True, None, None)
    torch.testing.assert_close(step, out)


def test_references_run_on_torch(device: torch.device) -> None:
    x, weight, bias = conv_arguments(device)
    idx = torch.arange(7, device=device).floor_divide(3).expand(2, 7).int().contiguous()
    got = causal_conv1d.causal_conv1d_ref(x, weight, bias, activation="silu", seq_idx=idx)
    assert torch.equal(got, compat.causal_conv1d_fn(x, weight, bias, idx, activation="silu"))
    states = torch.zeros(2, 2, 12, 3, device=device, dtype=torch.float64)
    ours = compat.causal_conv1d_update(x, states[0], weight, bias)
    assert torch.equal(causal_conv1d.causal_conv1d_update_ref(x, states[1], weight, bias), ours)
