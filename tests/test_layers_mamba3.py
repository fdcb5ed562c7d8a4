"""What is particular to layers.Mamba3: its parameters' names, its gradients, packed rows, and long turns."""

import copy
import math

import pytest
import torch
from torch._dynamo.utils import counters

import mamba_ops
from mamba_ops import use_backend
from mamba_ops.layers import Mamba3
from mamba_ops.ops._common.mamba3 import Tokens, layout, sums_in_blocks, total_turns
from mamba_ops.registry import record_selections


def new_layer(**options: object) -> Mamba3:
    torch.manual_seed(0)
    return Mamba3(16, heads=2, head_dim=8, dstate=8, chunk_size=4, **options)  # type: ignore[arg-type]


def test_parameters_are_mamba_ssms() -> None:
    names = {"in_proj.weight", "dt_bias", "B_bias", "C_bias", "B_norm.weight", "C_norm.weight", "D", "out_proj.weight"}
    layer = Mamba3(32, heads=4, head_dim=16, dstate=128, dtype=torch.bfloat16)
    assert set(layer.state_dict()) == names
    assert set(new_layer(out_norm=True).state_dict()) == {*names, "norm.weight"}
    assert layer.in_proj.weight.shape == (2 * 64 + 2 * 128 + 3 * 4 + 32, 32)
    assert layer.B_bias.shape == (4, 1, 128)
    assert layer.D.dtype == layer.dt_bias.dtype == layer.B_bias.dtype == torch.float32


@pytest.mark.usefixtures("fresh_dynamo")
def test_training_is_one_graph_forward_and_one_backward() -> None:
    layer = new_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.enable_grad(), use_backend("torch"):
        for length in (20, 21, 33):
            x = torch.randn(2, length, 16, requires_grad=True)
            inputs = [x, *layer.parameters()]
            grads = [torch.autograd.grad(f(x).square().mean(), inputs) for f in (layer, compiled)]
            torch.testing.assert_close(grads[1], grads[0])
            assert all(grad.abs().max() > 0 for grad in grads[0])
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


def test_gradients_are_right() -> None:
    """By finite differences, also where rows are packed."""
    layer = Mamba3(4, heads=2, head_dim=2, dstate=4, chunk_size=3, dtype=torch.float64, decay_dtype=torch.float64)
    with torch.enable_grad(), use_backend("torch"):
        x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
        ends = torch.tensor([0, 4, 7])
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            given = dict(zip(names, values, strict=True))
            return torch.func.functional_call(layer, given, (x,), {"cu_seqlens": ends})

        # what is turned is summed as whole numbers: far finer than the step of the differences
        assert torch.autograd.gradcheck(call, (x, *parameters), eps=1e-4, atol=1e-5, rtol=1e-4)


def test_packed_rows_are_as_alone() -> None:
    layer = new_layer().double()
    x = torch.randn(17, 16, dtype=torch.double)
    with torch.no_grad(), use_backend("torch"):
        packed = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 17]))
        torch.testing.assert_close(packed, torch.cat([layer(x[None, :5])[0], layer(x[None, 5:])[0]]))
        caches = layer.empty_caches(2, state_dtype=torch.float64)
        torch.testing.assert_close(layer(x[None, :9], *caches), layer(x[None, :9]))


@pytest.mark.parametrize("sizes", [{}, {"cu_seqlens": torch.tensor([0, 5, 17])}], ids=["rows", "packed"])
def test_calls_that_record_nothing_run_the_op(sizes: dict[str, torch.Tensor]) -> None:
    """Without caches, too: it is many times as fast as what it is made of, which has gradients."""
    layer, x = new_layer(), torch.randn(*([] if sizes else [1]), 17, 16)
    with record_selections() as recorded:
        with_gradients = layer(x, **sizes)
    assert "mamba_ops::mamba_chunk_scan_forward" in {s.op for s in recorded}
    with record_selections() as recorded, torch.no_grad():
        torch.testing.assert_close(layer(x, **sizes), with_gradients)
    assert "mamba_ops::mamba3_chunk_scan" in {s.op for s in recorded}


@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_sums_in_blocks_are_sums(count: int) -> None:
    whole = torch.randint(2**40, (count, 2, 3))
    assert torch.equal(sums_in_blocks(whole), whole.cumsum(0))


@pytest.mark.parametrize("out_norm", [False, True])
def test_no_rows_and_rows_of_no_token(out_norm: bool) -> None:
    layer = new_layer(out_norm=out_norm)
    for size in ((0, 3, 16), (3, 0, 16)):
        assert layer(torch.randn(size)).shape == size
    none = torch.tensor([0])
    assert layer(torch.randn(0, 16), cu_seqlens=none).shape == (0, 16)
    after_the_last = layer(torch.randn(5, 16), cu_seqlens=none)
    assert after_the_last.shape == (5, 16)
    after_the_last.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with torch.no_grad():
        caches = layer.empty_caches(1)
        assert layer(torch.randn(5, 16), *caches, cu_seqlens=none).shape == (5, 16)
        assert not any(cache.any() for cache in caches)


@pytest.mark.parametrize(
    ("size", "rows", "error"),
    [
        ((4, 16), {"cu_seqlens": torch.tensor([0.0, 4.0])}, "cu_seqlens: got float32, expected int32 or int64"),
        ((4, 16), {"cu_seqlens": torch.tensor([[0, 4]])}, r"cu_seqlens: got shape \(1, 2\), expected \(n \+ 1,\)"),
        (
            (4, 16),
            {"cu_seqlens": torch.tensor([0, 9])},
            "cu_seqlens: got 9 for the end of row 0, expected at most the 4",
        ),
        (
            (1, 4, 16),
            {"cu_seqlens": torch.tensor([0, 4])},
            r"hidden_states: got shape \(1, 4, 16\), expected \(tokens,",
        ),
        ((4, 16), {}, r"hidden_states: got shape \(4, 16\), expected \(tokens, hidden_size\) with cu_seqlens"),
        ((1, 4, 16), {"slots": torch.tensor([0])}, "slots: got a tensor, expected None where there are no caches"),
        ((1, 4, 16), {"has_initial_state": torch.tensor([True])}, "has_initial_state: got a tensor, expected None"),
    ],
)
@pytest.mark.parametrize("is_mimo", [False, True])
def test_wrong_rows_are_refused_without_caches_too(
    is_mimo: bool, size: tuple[int, ...], rows: dict[str, torch.Tensor], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        new_layer(is_mimo=is_mimo)(torch.zeros(size), **rows)


@pytest.mark.parametrize("is_mimo", [False, True])
@pytest.mark.parametrize("smallest", [-48.0, -44.0, -36.0, -20.0])
def test_gradients_of_the_smallest_steps_are_numbers(smallest: float, is_mimo: bool) -> None:
    """Among large steps: a step of about 2^-66 divides what the token before it, of a large one, is weighted by."""
    layer, hidden = new_layer(is_mimo=is_mimo), torch.randn(2, 40, 16)
    first = sum(layer.projected[:4])
    with torch.no_grad():
        layer.in_proj.weight.normal_()
        layer.in_proj.weight[first : first + layer.heads] = torch.eye(1, 16)  # dt is the first channel
        layer.dt_bias.zero_()
    hidden[:, :, 0] = torch.where(torch.rand(2, 40) < 0.5, 5.0, smallest)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        exact = copy.deepcopy(layer).to(dtype)
        tokens = hidden.to(dtype).requires_grad_()
        return list(torch.autograd.grad(exact(tokens).square().mean(), [tokens, *exact.parameters()]))

    for got, truth in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=1e-3 * float(truth.abs().max()))


def test_turns_of_long_sequences_are_as_exact_as_of_short_ones() -> None:
    tokens = 20000
    dt, angles = torch.full((tokens, 1), 0.7), torch.full((tokens, 1), 3.0)
    zeros, empty = torch.zeros(tokens, 1), torch.zeros(tokens, 1, 1)
    given = Tokens(empty, dt, zeros, zeros, angles, empty, empty)
    got = total_turns(given, layout(empty.unsqueeze(0), None), None).double()[:, 0, 0]
    each = (torch.tanh(angles) * dt).double()[:, 0]
    off = got - each.cumsum(0)
    assert (off - 2 * (off / 2).round()).abs().max() < 1e-7
    assert got.abs().max() <= 1
    assert math.isclose(float(got[0]), float(each[0]), rel_tol=1e-6)


def test_a_step_is_the_scan_of_one_token() -> None:
    sample = next(s for s in mamba_ops.mamba3_state_update.make_samples("cpu", dtype=torch.float32) if s.name == "gate")
    step, read = sample.clone(), sample.clone()
    with use_backend("torch"):
        y = mamba_ops.mamba3_state_update(*step.args, **step.kwargs)
        options = {n: v for n, v in read.kwargs.items() if n != "z"}
        caches = dict(zip(("angle_state", "ssm_state", "k_state", "v_state"), read.args[:4], strict=True))
        tokens = [t.unsqueeze(1) for t in read.args[4:]]
        options |= {"z": read.kwargs["z"].unsqueeze(1), "has_initial_state": torch.ones(3, dtype=torch.bool)}
        again = mamba_ops.mamba3_chunk_scan(*tokens, 4, **caches, **options)
    torch.testing.assert_close(again.squeeze(1), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.args[:4], step.args[:4], rtol=1e-5, atol=1e-5)
