"""Every op that trains x backend x sample against autograd of its oracle; what gradients may not depend on."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mamba_ops import functional
from mamba_ops.ops import causal_conv1d
from mamba_ops.registry import Op, Sample, explain, use_backend
from tests.conftest import ACCELERATOR
from tests.harness import backends_here
from tests.training.gradients import TRAINED, activation, gradients, is_float, judge, named

DEVICE = ACCELERATOR or torch.device("cpu")
PAIRS = [
    pytest.param(op, backend, id=f"{op.name}-{backend}")
    for op in TRAINED
    for backend in backends_here(op.backward_op, DEVICE)
]
DAILY = ("base", "gate", "packed", "tokens past the end", "packed, tokens past the end", "everything")
"""Samples for every day on Triton's interpreter, whose kernels take seconds."""


_SLOW = ("selective_scan-triton",)


def slow(pair: str, sample: Sample) -> bool:
    return pair.endswith("-triton") and ACCELERATOR is None and (sample.name not in DAILY or pair in _SLOW)


@pytest.mark.parametrize(
    ("op", "backend", "sample"),
    [
        pytest.param(*pair.values, s, id=f"{pair.id}-{s}", marks=[pytest.mark.slow] * slow(str(pair.id), s))
        for pair in PAIRS
        for s in pair.values[0].backward_op.make_samples(DEVICE)
    ],
)
def test_against_the_oracle(op: Op[...], backend: str, sample: Sample) -> None:
    judge(op, sample, backend)


@pytest.mark.parametrize(
    "pair", [pytest.param(p.values, id=p.id, marks=[pytest.mark.slow] * (p.id in _SLOW)) for p in PAIRS]
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, pytest.param(torch.float32, marks=[pytest.mark.slow] * (ACCELERATOR is None))],
    ids=str,
)
def test_one_input_of_a_wide_dtype_among_others(pair: tuple[Op[...], str], dtype: torch.dtype) -> None:
    """Kernels multiply in float32 at most, whichever input is wider; or refuse it."""
    op, backend = pair
    sample = op.backward_op.make_samples(DEVICE)[0]
    taken = 0
    for i, value in enumerate(sample.args):
        if is_float(value):
            wide = Sample(f"argument {i}", (*sample.args[:i], value.to(dtype), *sample.args[i + 1 :]))
            with use_backend(backend):
                chosen = explain(op.backward_op, *wide.args).backend
            if chosen == backend:
                taken += 1
                judge(op, wide, backend)
    assert taken > 1


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_every_input_of_every_sample_in_float64(op: Op[...]) -> None:
    """The reference, by finite differences, each optional present and absent."""
    states = op.forward_states_op
    seen = set()
    for sample in states.make_samples("cpu", **TINY[op.name]):
        call = {n: v.to(torch.double) if is_float(v) else v for n, v in named(states, sample).items()}
        if any(isinstance(v, Tensor) and v.numel() == 0 for v in call.values()):
            continue
        leaves = {n: v.requires_grad_() for n, v in call.items() if is_float(v)}
        if (key := (frozenset(leaves), call["cu_seqlens"] is None)) in seen:
            continue
        seen.add(key)

        def run(*values: Tensor, call: dict = call, leaves: dict = leaves) -> tuple[Tensor, ...]:
            return states(**{**call, **dict(zip(leaves, values, strict=True))})

        assert torch.autograd.gradcheck(run, list(leaves.values()), fast_mode=True), sample
    assert seen
    optional = {p.name for p in states._called if p.annotation == Tensor | None} - {"cu_seqlens"}
    for name in optional:
        assert len({name in present for present, _ in seen}) == 2, name


TINY = {
    "causal_conv1d": {"dim": 2, "length": 4},
    "chunk_gated_delta_rule": {"k_heads": 1, "v_heads": 2, "k_dim": 2, "v_dim": 2, "length": 4},
    "chunk_kda": {"k_heads": 1, "v_heads": 2, "k_dim": 2, "v_dim": 2, "length": 4},
    "selective_scan": {"dim": 4, "dstate": 2, "length": 4},
    "mamba_chunk_scan": {"heads": 2, "dim": 2, "dstate": 3, "groups": 1, "chunk_size": 4},
}


# On a GPU the reference's matrix products are cuBLAS's, whose last bits may change with the number of rows.
# The scan's interpreted kernels take a minute; tests/ops/selective_scan has its rows in each day's tests.
BITWISE = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.slow] * (ACCELERATOR is None and pair.id in _SLOW))
    for pair in PAIRS
    if DEVICE.type == "cpu" or "torch" not in pair.values
]


@pytest.mark.parametrize(("op", "backend"), BITWISE)
def test_the_same_bits_again_and_in_company(op: Op[...], backend: str) -> None:
    """A second run, and among more rows: but for the gradients of parameters, which sum over the rows."""
    sample = op.backward_op.make_samples(DEVICE)[0]
    first, again = (gradients(op, sample.clone(), backend) for _ in range(2))
    assert first
    assert all(torch.equal(first[name], again[name]) for name in first)
    call = named(op.backward_op, sample)
    rows = activation(call).shape[0]
    for row in range(rows):
        one = [v[row : row + 1] if is_float(v) and v.shape[0] == rows and v.dim() > 1 else v for v in sample.args]
        alone = gradients(op, Sample("alone", tuple(one)), backend)
        compared = [n for n in alone if alone[n].dim() > 2]
        assert compared
        for name in compared:
            assert torch.equal(alone[name][0], first[name][row]), name


@pytest.mark.parametrize(("op", "backend"), BITWISE)
def test_packed_rows_are_as_alone(op: Op[...], backend: str) -> None:
    """And tokens that are in no row have zeros, whatever is in them."""
    sample = next(s for s in op.backward_op.make_samples(DEVICE) if s.name == "everything")
    call = named(op.backward_op, sample)
    ends = call["cu_seqlens"].tolist()
    for name, value in call.items():
        if is_float(value) and value.shape[:1] == activation(call).shape[:1]:
            call[name] = torch.cat((value[: ends[-1]], torch.full_like(value[ends[-1] :], torch.nan)))
    packed = gradients(op, Sample("packed", tuple(call.values())), backend)
    of_tokens = [n for n in packed if packed[n].shape[:1] == activation(call).shape[:1]]
    for name in of_tokens:
        assert not packed[name][ends[-1] :].any()
    assert of_tokens
    assert not any(gradient.isnan().any() for gradient in packed.values())
    for row, (start, end) in enumerate(pairwise(ends)):
        alone = {}
        for name, value in call.items():
            if is_float(value) and value.shape[:1] == activation(call).shape[:1]:
                value = value[start:end].unsqueeze(0)
            elif is_float(value) and name.endswith("_states"):
                value = value[row : row + 1]
            alone[name] = None if name == "cu_seqlens" else value
        found = gradients(op, Sample("alone", tuple(alone.values())), backend)
        for name in of_tokens:
            assert torch.equal(found[name][0], packed[name][start:end]), name
        if call["initial_states"] is not None:
            assert torch.equal(found["grad_initial_states"][0], packed["grad_initial_states"][row])


@pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(
            *pair.values, id=pair.id, marks=[pytest.mark.slow] * (ACCELERATOR is None and "triton" in pair.values)
        )
        for pair in BITWISE
    ],
)
def test_a_token_that_is_no_number_spoils_its_own_row_alone(op: Op[...], backend: str) -> None:
    sample = next(s for s in op.backward_op.make_samples(DEVICE) if "packed" in s.name)
    call, states = named(op.backward_op, sample), op.forward_states_op
    _, start, *_, end = call["cu_seqlens"].tolist()
    whole = activation(call).shape[0]
    spoiled = {n: v for n, v in call.items() if is_float(v) and v.shape[0] == whole}
    for name, value in spoiled.items():
        spoiled[name] = value.clone()
        spoiled[name][start - 1] = torch.nan
    found = []
    with torch.no_grad(), use_backend(backend):
        for given in (call, call | spoiled):
            output, final = states(**{p.name: given[p.name] for p in states._called})
            gradients_ = dict(zip(op.backward_op.returns, op.backward_op(**given), strict=True))
            of_tokens = {n: g[start:end] for n, g in gradients_.items() if g.shape[:1] == (whole,)}
            found.append({"output": output[start:end], "final": final[1:], **of_tokens})
    for name, expected in found[0].items():
        assert expected.numel()
        assert torch.equal(found[1][name], expected), name


@pytest.mark.parametrize(("op", "backend"), BITWISE)
def test_tokens_of_no_row_at_all(op: Op[...], backend: str) -> None:
    sample = next(s for s in op.backward_op.make_samples(DEVICE) if "packed" in s.name)
    call, states = named(op.backward_op, sample), op.forward_states_op
    none = {n: call[n][:0] for n in ("cu_seqlens", "initial_states", "grad_final_states") if call[n] is not None}
    call |= none | {"cu_seqlens": call["cu_seqlens"].new_zeros(1)}
    with torch.no_grad(), use_backend(backend):
        output, final = states(**{p.name: call[p.name] for p in states._called})
        found = op.backward_op(**call)
    assert output.numel()
    assert final.shape[0] == 0
    assert not any(tensor.count_nonzero() for tensor in (output, *found))


@pytest.mark.parametrize("backend", backends_here(causal_conv1d.backward_op, DEVICE))
def test_a_convolution_of_no_channels(backend: str) -> None:
    """Its forward takes them."""
    for x, more in ((torch.randn(2, 5, 0), {}), (torch.randn(5, 0), {"cu_seqlens": torch.tensor([0, 2, 5])})):
        inputs = [t.to(DEVICE).requires_grad_() for t in (x, torch.randn(0, 4), torch.randn(2, 0, 3))]
        rows = {name: value.to(DEVICE) for name, value in more.items()}
        with use_backend(backend):
            output, final = functional.causal_conv1d(*inputs[:2], initial_states=inputs[2], **rows)
            found = torch.autograd.grad(output.sum() + final.sum(), inputs)
        assert [gradient.shape for gradient in found] == [t.shape for t in inputs]


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_two_halves_are_the_whole(op: Op[...]) -> None:
    """The final states of the first half as initial states of the second: their gradients go through."""
    states = op.forward_states_op
    sample = next(s for s in states.make_samples("cpu") if s.name == "no optional" or s.name == "no optionals")
    call = {n: v.double() if is_float(v) else v for n, v in named(states, sample).items()}
    leaves = {n: v.requires_grad_() for n, v in call.items() if is_float(v)}
    length = activation(call).shape[1]
    of_tokens = [n for n, v in leaves.items() if v.shape[:2] == activation(call).shape[:2]]
    whole, end = states(**call)
    half = [
        {**call, **{n: call[n][:, part] for n in of_tokens}}
        for part in (slice(0, length // 2), slice(length // 2, None))
    ]
    first, between = states(**half[0])
    second, last = states(**{**half[1], "initial_states": between})
    for got, expected in ((torch.cat((first, second), 1), whole), (last, end)):
        torch.testing.assert_close(got, expected)
    losses = (whole.sin().sum() + end.cos().sum(), first.sin().sum() + second.sin().sum() + last.cos().sum())
    for got, expected in zip(*(torch.autograd.grad(loss, list(leaves.values())) for loss in losses), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", TRAINED, ids=lambda op: op.name)
def test_the_front_trains(op: Op[...]) -> None:
    """Without a cache the op itself records gradients, those of its forward; with one it says what to call."""
    sample = op.forward_op.make_samples("cpu")[0]
    call = {n: v.requires_grad_() if is_float(v) else v for n, v in named(op.forward_op, sample).items()}
    call["initial_states"] = None
    own = {n: v for n, v in call.items() if n != "initial_states"}
    leaves = [v for v in own.values() if is_float(v)]
    grads = (torch.autograd.grad(f(**a).float().sum(), leaves) for f, a in ((op, own), (op.forward_op, call)))
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=rf"{op.name}: \w: got .* for gradients of states call mamba_ops.functional"):
        op(**own, out=torch.empty_like(activation(call)))
    with torch.no_grad(), use_backend("torch"):
        assert torch.equal(op(**own), op.forward_op(**call))
