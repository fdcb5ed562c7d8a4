"""What is particular to layers.ShortConv: padding and packed documents as in Transformers, training, its config."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mamba_ops import use_backend
from mamba_ops.compat.transformers import cache_keyword
from mamba_ops.layers import ShortConv
from mamba_ops.serving import Plan

HIDDEN = 16


@pytest.fixture
def pair(device: torch.device) -> tuple[Any, ShortConv]:
    """A short convolution of Transformers, and the layer with its weights."""
    modeling = pytest.importorskip("transformers.models.lfm2.modeling_lfm2")
    config = modeling.Lfm2Config(hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["conv"], conv_L_cache=4)
    mixer = modeling.Lfm2ShortConv(config, 0).eval()
    layer = ShortConv.from_config(config)
    layer.load_state_dict(mixer.state_dict())
    return mixer.to(device).requires_grad_(False), layer.to(device).requires_grad_(False)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_padded_on_the_left(pair: tuple[Any, ShortConv], device: torch.device) -> None:
    """As in Transformers, and as the same rows without their padding; steps go on from there."""
    transformers = pytest.importorskip("transformers")
    mixer, layer = pair
    lengths, most = [9, 4, 1], 9
    mask = torch.arange(most, device=device) >= most - torch.tensor(lengths, device=device).unsqueeze(1)
    hidden, more = torch.randn(3, most, HIDDEN, device=device), torch.randn(3, 5, HIDDEN, device=device)
    cache, caches = transformers.DynamicCache(config=mixer.config), layer.empty_caches(3)
    expected = mixer(hidden, **{cache_keyword(mixer): cache}, attention_mask=mask)
    got = layer(hidden * mask.unsqueeze(-1), *caches)
    close(got, expected)
    for row, length in enumerate(lengths):
        close(got[row, most - length :], layer(hidden[row : row + 1, most - length :])[0])
    for token in more.split(1, dim=1):
        close(layer.step(token, *caches), mixer(token, **{cache_keyword(mixer): cache}))


def test_packed_documents_are_as_alone(pair: tuple[Any, ShortConv], device: torch.device) -> None:
    mixer, layer = pair
    lengths = [5, 1, 0, 12, 2]
    hidden = torch.randn(sum(lengths), HIDDEN, device=device)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    got = layer(hidden, cu_seqlens=ends)
    alone = [mixer(part.unsqueeze(0))[0] for part in hidden.split(lengths) if len(part)]
    close(got, torch.cat(alone))


def test_padding_rows_of_a_plan_are_zero_whatever_their_tokens(device: torch.device) -> None:
    """Their gates too may be NaN."""
    layer = ShortConv(HIDDEN, device=device).requires_grad_(False)
    [conv_state] = layer.empty_caches(2)
    plan = Plan.of([3, 3], [1, 1], [-1, 0], max_requests=4, device=device)
    projected = torch.randn(3, 3 * HIDDEN, device=device)
    projected[0], projected[2] = torch.nan, torch.inf
    got = layer.mix(projected, conv_state, plan)
    assert not got[[0, 2]].any()
    assert got[1].isfinite().all()
    assert got[1].any()


@pytest.mark.usefixtures("fresh_dynamo")
def test_training_is_one_graph_forward_and_one_backward() -> None:
    torch.manual_seed(0)
    layer = ShortConv(HIDDEN, bias=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.enable_grad(), use_backend("torch"):
        for length in (20, 21, 33):
            x = torch.randn(2, length, HIDDEN, requires_grad=True)
            inputs = [x, *layer.parameters()]
            grads = [torch.autograd.grad(f(x).square().mean(), inputs) for f in (layer, compiled)]
            torch.testing.assert_close(grads[1], grads[0])
            assert all(grad.abs().max() > 0 for grad in grads[0])
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["aot_autograd"]["ok"] == 1


def test_packed_rows_train_as_alone() -> None:
    layer = ShortConv(HIDDEN).double()
    with torch.enable_grad():
        x = torch.randn(17, HIDDEN, dtype=torch.double, requires_grad=True)
        packed = layer(x, cu_seqlens=torch.tensor([0, 5, 5, 17]))
        alone = torch.cat([layer(x[None, :5])[0], layer(x[None, 5:])[0]])
        torch.testing.assert_close(packed, alone)
        inputs = [x, *layer.parameters()]
        grads = (torch.autograd.grad(y.sin().sum(), inputs) for y in (packed, alone))
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)


def test_a_config_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ShortConv\.from_config: config: .*'conv_L_cache'; expected Transf"):
        ShortConv.from_config(SimpleNamespace(hidden_size=8))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_selection_first_made_in_inference_mode_trains_too() -> None:
    """What stands for it is a graph's input, and no inference tensor can be saved for a backward."""
    layer, x = ShortConv(HIDDEN), torch.randn(2, 20, HIDDEN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    rare = {"causal_conv1d": "torch", "kda_update": "torch", "mamba_chunk_scan": "torch"}  # that no test selects
    with torch.enable_grad():
        compiled(x).sum().backward()
        with torch.inference_mode(), use_backend(**rare):
            pass
        with use_backend(**rare):
            compiled(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
