"""The functions of mamba_ssm, causal_conv1d and fla over our ops: states, packed sequences, gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

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


STATES = {  # initial states, and what asks for final ones
    "causal_conv1d_fn": ("initial_states", "return_final_states", (2, 12, 3)),
    "mamba_chunk_scan_combined": ("initial_states", "return_final_states", (2, 4, 8, 16)),
    "chunk_gated_delta_rule": ("initial_state", "output_final_state", (2, 4, 4, 6)),
    "fused_recurrent_gated_delta_rule": ("initial_state", "output_final_state", (2, 4, 4, 6)),
    "chunk_kda": ("initial_state", "output_final_state", (2, 4, 4, 6)),
    "fused_recurrent_kda": ("initial_state", "output_final_state", (2, 4, 4, 6)),
}
NOT_REAL = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", NOT_REAL, ids=str)
@pytest.mark.parametrize("function", STATES)
def test_states_are_not_cast_from_other_kinds_of_numbers(
    device: torch.device, function: str, dtype: torch.dtype
) -> None:
    call, arguments, (name, wanted, shape) = (
        getattr(compat, function),
        good_arguments(function, device),
        STATES[function],
    )
    state = torch.ones(shape, device=device).to(dtype)
    with pytest.raises(
        ValueError, match=f"^{function}: {name}: got {str(dtype).removeprefix('torch.')}, expected float"
    ):
        call(**arguments, **{name: state, wanted: True})


@pytest.mark.parametrize("function", STATES)
def test_there_is_one_state_for_each_row(device: torch.device, function: str) -> None:
    """Neither one too many nor one for all."""
    call, arguments, (name, wanted, shape) = (
        getattr(compat, function),
        good_arguments(function, device),
        STATES[function],
    )
    for rows in (1, 3):
        state = torch.ones(rows, *shape[1:], device=device)
        with pytest.raises(
            ValueError, match=rf"^{function}: {name}: got shape \({rows}, .*: a state for each sequence"
        ):
            call(**arguments, **{name: state, wanted: True})


@pytest.mark.parametrize("dtype", NOT_REAL, ids=str)
@pytest.mark.parametrize("name", ["g", "beta", "A_log", "dt_bias"])
@pytest.mark.parametrize("function", DELTA_RULES)
def test_gates_are_not_cast_from_other_kinds_of_numbers(
    device: torch.device, function: str, name: str, dtype: torch.dtype
) -> None:
    arguments = delta_rule_arguments(function, device)
    arguments |= {"A_log": torch.ones(4, device=device), "dt_bias": torch.ones(arguments["g"].shape[2:], device=device)}
    arguments[name] = torch.ones_like(arguments[name]).float().to(dtype)
    with pytest.raises(ValueError, match=f"^{function}: {name}: got "):
        getattr(compat, function)(**arguments, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True)


def test_final_states_go_where_they_fit(device: torch.device) -> None:
    x, weight, bias = conv_arguments(device)
    for shape, dtype in (((2, 12, 4), x.dtype), ((1, 2, 12, 3), x.dtype), ((2, 12, 3), torch.int64)):
        kept = torch.ones(shape, device=device, dtype=dtype)
        with pytest.raises(ValueError, match=r"^causal_conv1d_fn: final_states_out: got "):
            compat.causal_conv1d_fn(x, weight, bias, return_final_states=True, final_states_out=kept)
        assert (kept == 1).all()


@pytest.mark.parametrize("name", ["x", "weight"])
def test_final_states_leave_what_a_backward_reads(device: torch.device, name: str) -> None:
    x, weight, _ = conv_arguments(device)
    memory = {"x": x, "weight": weight}[name]
    x, weight = x.contiguous().clone(), weight.clone()
    call = {"x": x, "weight": weight} | {name: torch.zeros(x.numel(), device=device, dtype=x.dtype)[: memory.numel()]}
    call[name] = call[name].view(memory.shape).copy_(memory)
    room = torch.empty(0, dtype=x.dtype, device=device).set_(call[name].untyped_storage())[: 2 * 12 * 3].view(2, 12, 3)
    call = {n: t.requires_grad_() for n, t in call.items()}
    with torch.enable_grad(), pytest.raises(ValueError, match=f"final_states_out: got .* shares memory with {name}"):
        compat.causal_conv1d_fn(**call, return_final_states=True, final_states_out=room)
    assert torch.equal(call[name], memory)
    _, states = compat.causal_conv1d_fn(**call, return_final_states=True, final_states_out=room)
    assert states is room  # without a backward they go there, after all that is computed


@pytest.mark.parametrize("function", ["mamba_chunk_scan_combined", "chunk_gated_delta_rule", "selective_scan_fn"])
def test_states_of_calls_with_and_without_gradients_are_alike(device: torch.device, function: str) -> None:
    """Dtypes and layouts too: both are computed in other ways."""
    arguments = {n: t.bfloat16() if isinstance(t, Tensor) else t for n, t in good_arguments(function, device).items()}
    wanted = STATES[function][1] if function in STATES else "return_last_state"
    options = {STATES[function][0]: torch.randn(STATES[function][2], device=device)} if function in STATES else {}
    plain = getattr(compat, function)(**arguments, **options, **{wanted: True})
    first = next(n for n, t in arguments.items() if isinstance(t, Tensor))
    with torch.enable_grad():
        arguments[first] = arguments[first].clone().requires_grad_()
        recorded = getattr(compat, function)(**arguments, **options, **{wanted: True})
    for one, other in zip(plain, recorded, strict=True):
        assert other.requires_grad
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)


def packed_rows(device: torch.device) -> tuple[Tensor, list[list[tuple[int, int, int]]]]:
    """The sequence of every token of two rows, and of each row its sequences: row, first token, end."""
    lengths, idx = ([4, 1, 16], [9, 12]), torch.zeros(2, 21, dtype=torch.int32, device=device)
    rows = []
    for row, of_row in enumerate(lengths):
        ends = [sum(of_row[: i + 1]) for i in range(len(of_row))]
        rows.append([(row, end - length, end) for length, end in zip(of_row, ends, strict=True)])
        for number, (_, begin, end) in enumerate(rows[-1]):
            idx[row, begin:end] = number + 3 * row
    return idx, rows


def test_conv_keeps_sequences_of_a_row_apart(device: torch.device) -> None:
    x, weight, bias = conv_arguments(device, 21)
    idx, rows = packed_rows(device)
    out = compat.causal_conv1d_fn(x, weight, bias, idx, activation="silu")
    for row, begin, end in [sequence for of_row in rows for sequence in of_row]:
        alone = compat.causal_conv1d_fn(x[row : row + 1, :, begin:end], weight, bias, activation="silu")
        torch.testing.assert_close(out[row : row + 1, :, begin:end], alone)
    ends = torch.tensor([0, 4, 5, 21], dtype=torch.int32, device=device)
    assert torch.equal(compat.causal_conv1d_fn(x[:1], weight, bias, activation="silu", cu_seqlens=ends), out[:1])
    with pytest.raises(ValueError, match="cu_seqlens: got a batch of 2, expected 1"):
        compat.causal_conv1d_fn(x, weight, bias, cu_seqlens=ends)
    with pytest.raises(ValueError, match="seq_idx: got packed sequences, expected no final states"):
        compat.causal_conv1d_fn(x, weight, bias, idx, return_final_states=True)


def test_scan_keeps_sequences_of_a_row_apart(device: torch.device) -> None:
    """Final states are those of the rows' last sequences, as in the original."""
    arguments = scan_arguments(device)
    idx, rows = packed_rows(device)
    out, last = compat.mamba_chunk_scan_combined(**arguments, chunk_size=8, seq_idx=idx, return_final_states=True)
    for of_row in rows:
        for row, begin, end in of_row:
            alone = {n: t[row : row + 1, begin:end] if t.dim() > 1 else t for n, t in arguments.items()}
            expected, state = compat.mamba_chunk_scan_combined(**alone, chunk_size=8, return_final_states=True)
            torch.testing.assert_close(out[row : row + 1, begin:end], expected)
        torch.testing.assert_close(last[of_row[0][0]], state[0])
    assert torch.equal(compat.mamba_chunk_scan_combined(**arguments, chunk_size=8, seq_idx=idx), out)


# -- gradients --------------------------------------------------------------------------------------------------------


PACKS = ("causal_conv1d_fn", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
RECORDED = (*PACKS, "selective_scan_fn", "chunk_gated_delta_rule")


@pytest.mark.parametrize(
    ("function", "packed"), [*((name, False) for name in RECORDED), *((name, True) for name in PACKS)]
)
def test_gradients_are_those_of_finite_differences(device: torch.device, function: str, packed: bool) -> None:
    """Of every tensor, through initial and final states, in float64."""
    arguments = {n: v for n, v in good_arguments(function, device).items() if v is not None}
    options: dict[str, Any] = {}
    if function == "mamba_split_conv1d_scan_combined":
        arguments["zxbcdt"] = torch.randn(2, 7, 132, device=device)
        arguments |= {"conv1d_weight": torch.randn(96, 4), "conv1d_bias": torch.randn(96)}
        arguments |= {"rmsnorm_weight": torch.randn(32), "outproj_weight": torch.randn(5, 32), "ngroups": 2}
        options["outproj_bias"] = torch.randn(5, device=device).double()
    if packed:
        length = 7 if function != "mamba_chunk_scan_combined" else 21
        options["seq_idx"] = (torch.arange(length, device=device) // 5).expand(2, -1).contiguous()
    elif function in STATES:
        name, wanted, shape = STATES[function]
        arguments[name], options[wanted] = torch.randn(shape), True
    elif function == "selective_scan_fn":
        options["return_last_state"] = True
    if function == "chunk_gated_delta_rule":
        options |= {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_qk_l2norm_in_kernel": True}
        arguments |= {"A_log": torch.randn(4), "dt_bias": torch.randn(4)}
    leaves = {n: t.to(device).double().requires_grad_() for n, t in arguments.items() if isinstance(t, Tensor)}
    options |= {n: v for n, v in arguments.items() if n not in leaves}

    def run(*values: Tensor) -> Any:
        return getattr(compat, function)(**dict(zip(leaves, values, strict=True)), **options)

    with torch.enable_grad():
        assert torch.autograd.gradcheck(run, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(
    "function", ["causal_conv1d_update", "selective_state_update", "fused_recurrent_gated_delta_rule"]
)
def test_decoding_has_no_gradients_and_says_so(device: torch.device, function: str) -> None:
    arguments = good_arguments(function, device)
    name = "q" if "delta" in function else "x"
    states = [n for n in arguments if n.endswith("state")]

    def call() -> Any:
        return getattr(compat, function)(**arguments | {n: arguments[n].clone() for n in states})

    plain = call()
    arguments[name] = arguments[name].clone().requires_grad_()
    with torch.enable_grad():
        result = call()
        out = result[0] if isinstance(result, tuple) else result
        with pytest.raises(NotImplementedError, match=f"^{function}: backward: got a gradient .*, expected none"):
            out.sum().backward()
    assert torch.equal(out, plain[0] if isinstance(plain, tuple) else plain)
