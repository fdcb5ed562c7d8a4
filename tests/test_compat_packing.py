"""Packed sequences in the functions of mamba_ssm and causal_conv1d: each is itself alone, eager and in one graph."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ops.compat import packing
from mamba_ops.registry import use_backend
from tests.compat_inputs import compat, conv_arguments, scan_arguments

LENGTH = 21
LENGTHS = ([4, 1, 16], [9, 12])


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with use_backend("torch"):  # which alone takes float64
        yield


def numbers(device: torch.device) -> Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(row)) + 3, torch.tensor(row)) for row in LENGTHS]
    return torch.stack(rows).int().to(device)


def calls(function: str, device: torch.device) -> tuple[dict[str, Any], dict[str, Any], str, tuple[int, ...]]:
    """Arguments by token, and others; where a row's initial states go, and their shape."""
    if function == "causal_conv1d_fn":
        x, weight, bias = conv_arguments(device, LENGTH)
        return {"x": x.transpose(1, 2)}, {"weight": weight, "bias": bias}, "initial_states", (2, 12, 3)
    scan = scan_arguments(device, LENGTH)
    scan["z"] = torch.randn_like(scan["x"])
    tokens = {name: scan.pop(name) for name in ("x", "dt", "B", "C", "z")}
    others = scan | {"chunk_size": 8, "dt_softplus": True, "dt_limit": (0.05, 2.0)}
    if function == "mamba_chunk_scan_combined":
        return tokens, others, "initial_states", (2, 4, 8, 16)
    both = torch.randn(2, LENGTH, 2 * 5 + 32 + 96 + 4, device=device, dtype=torch.float64)
    del others["dt_softplus"]
    normal = {"conv1d_weight": (96, 4), "conv1d_bias": (96,), "rmsnorm_weight": (32,), "outproj_weight": (6, 37)}
    others |= {n: torch.randn(s, device=device, dtype=torch.float64) for n, s in normal.items()}
    return {"zxbcdt": both}, others | {"ngroups": 2, "headdim": 8}, "initial_states", (2, 4, 8, 16)


FUNCTIONS = ("causal_conv1d_fn", "mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")


def run(function: str, tokens: dict[str, Tensor], **others: Any) -> Tensor:
    if function == "causal_conv1d_fn":
        return compat.causal_conv1d_fn(tokens["x"].transpose(1, 2), **others).transpose(1, 2)
    return getattr(compat, function)(**tokens, **others)


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_sequences_are_themselves_alone(device: torch.device, function: str, states: bool) -> None:
    """Their gradients too; a row's initial states are those of its first sequence."""
    if function == "mamba_split_conv1d_scan_combined" and states:
        return  # its convolution has none
    tokens, others, name, shape = calls(function, device)
    initial = torch.randn(shape, device=device, dtype=torch.float64)
    leaves = {n: t for n, t in (tokens | others).items() if isinstance(t, Tensor)} | {name: initial}
    if not states:
        del leaves[name]
    for leaf in leaves.values():
        leaf.requires_grad_()
    expected, rows = [], []
    for row, lengths in enumerate(LENGTHS):
        begin = 0
        for length in lengths:
            part = {n: t[row : row + 1, begin : begin + length] for n, t in tokens.items()}
            first = {name: initial[row : row + 1]} if states and begin == 0 else {}
            rows.append(run(function, part, **others, **first))
            begin += length
        expected.append(torch.cat(rows, 1))
        rows = []
    want = torch.cat(expected)
    weight = torch.randn_like(want)
    want_grads = torch.autograd.grad((want * weight).sum(), list(leaves.values()))

    def packed(idx: Tensor) -> Tensor:
        return run(function, tokens, **others, seq_idx=idx, **({name: initial} if states else {}))

    for call in (packed, torch.compile(packed, fullgraph=True, backend="aot_eager")):
        got = call(numbers(device))
        torch.testing.assert_close(got, want)
        grads = torch.autograd.grad((got * weight).sum(), list(leaves.values()))
        for leaf, grad, other in zip(leaves, grads, want_grads, strict=True):
            torch.testing.assert_close(grad, other, msg=lambda text, leaf=leaf: f"{leaf}: {text}")


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_over_packings(device: torch.device) -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    tokens, others, *_ = calls("mamba_split_conv1d_scan_combined", device)
    call = torch.compile(
        lambda idx: run("mamba_split_conv1d_scan_combined", tokens, **others, seq_idx=idx),
        fullgraph=True,
        backend=count,
    )
    idx = numbers(device)
    for given in (idx, idx.flip(1), torch.zeros_like(idx)):
        torch.testing.assert_close(
            call(given), run("mamba_split_conv1d_scan_combined", tokens, **others, seq_idx=given)
        )
    assert graphs == 1


def test_final_states_of_graphs_are_those_of_last_sequences(device: torch.device) -> None:
    tokens, others, *_ = calls("mamba_chunk_scan_combined", device)
    options = {"seq_idx": numbers(device), "return_final_states": True}

    def call() -> Any:
        return compat.mamba_chunk_scan_combined(**tokens, **others, **options)

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(), call())


@pytest.mark.parametrize("final", [False, True])
def test_varlen_states_are_those_of_every_sequence(device: torch.device, final: bool) -> None:
    tokens, others, *_ = calls("mamba_chunk_scan_combined", device)
    tokens = {n: t[:1] for n, t in tokens.items()}
    ends, idx = torch.tensor([0, 4, 5, 21], dtype=torch.int32, device=device), numbers(device)[:1]
    options = {"cu_seqlens": ends, "return_varlen_states": True, "return_final_states": final}
    out, *states = compat.mamba_chunk_scan_combined(**tokens, **others, seq_idx=idx, **options)
    assert len(states) == 1 + final
    bounds = ends.tolist()
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = {n: t[:, begin:end] for n, t in tokens.items()}
        alone, last = compat.mamba_chunk_scan_combined(**part, **others, return_final_states=True)
        torch.testing.assert_close(out[:, begin:end], alone)
        torch.testing.assert_close(states[-1][number], last[0])
    if final:
        torch.testing.assert_close(states[0], states[-1][-1:])
    given = torch.randn_like(states[-1])
    out, _ = compat.mamba_chunk_scan_combined(
        **tokens, **others, initial_states=given, **options | {"return_final_states": False}
    )
    part = {n: t[:, 4:5] for n, t in tokens.items()}
    torch.testing.assert_close(
        out[:, 4:5], compat.mamba_chunk_scan_combined(**part, **others, initial_states=given[1:2])
    )


def test_tokens_of_no_sequence_give_zeros(device: torch.device) -> None:
    x, weight, bias = conv_arguments(device, LENGTH)
    idx = numbers(device)
    whole = compat.causal_conv1d_fn(x, weight, bias, idx, activation="silu")
    idx[0, -3:] = -1
    for call in (compat.causal_conv1d_fn, torch.compile(compat.causal_conv1d_fn, fullgraph=True, backend="aot_eager")):
        out = call(x, weight, bias, idx, activation="silu")
        assert not out[0, :, -3:].any()
        torch.testing.assert_close(out[0, :, :-3], whole[0, :, :-3])
        torch.testing.assert_close(out[1], whole[1])


def test_a_seq_idx_is_read_again_when_it_changed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = conv_arguments(device, LENGTH)
    reads, begins = [], packing.begins_anew
    monkeypatch.setattr(packing, "begins_anew", lambda idx: reads.append(idx) or begins(idx))
    idx = numbers(device)
    first = compat.causal_conv1d_fn(x, weight, bias, idx)
    assert torch.equal(compat.causal_conv1d_fn(x, weight, bias, idx), first)
    assert len(reads) == 1
    idx.zero_()
    torch.testing.assert_close(compat.causal_conv1d_fn(x, weight, bias, idx), compat.causal_conv1d_fn(x, weight, bias))
    assert len(reads) == 2
    with torch.inference_mode():  # such a tensor does not say whether it changed
        idx = numbers(device)
        compat.causal_conv1d_fn(x, weight, bias, idx)
        compat.causal_conv1d_fn(x, weight, bias, idx)
    assert len(reads) == 4


def test_many_short_sequences_lose_no_precision(device: torch.device) -> None:
    """In float32, in one chunk, against float64."""
    tokens, others, *_ = calls("mamba_chunk_scan_combined", device)
    others |= {"chunk_size": 64, "dt_limit": (0.0, float("inf"))}
    idx = torch.arange(LENGTH, device=device).floor_divide(2).expand(2, -1).int().contiguous()
    want = compat.mamba_chunk_scan_combined(**tokens, **others, seq_idx=idx)
    small = [{n: t.float() if isinstance(t, Tensor) else t for n, t in d.items()} for d in (tokens, others)]

    def call(idx: Tensor) -> Tensor:
        return compat.mamba_chunk_scan_combined(**small[0], **small[1], seq_idx=idx)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(idx)
    assert (got - want).abs().max() < 4e-7 * want.abs().max() + 2 * (call(idx) - want).abs().max()
