"""Layers have any number of caches, in a NamedTuple: toys with three of them beside the layers with a pair."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mamba_ops.layers import Mamba2
from mamba_ops.layers.caches import Cache, ConvAndState, require_caches
from mamba_ops.layers.mixer import Mixer, Taps
from mamba_ops.ops import causal_conv1d, causal_conv1d_update
from mamba_ops.ops._common.sequences import DecodeArgs, SequenceArgs
from mamba_ops.registry import answering
from mamba_ops.serving import StatePool
from tests.layers import HIDDEN, KINDS, new_layer

pytestmark = pytest.mark.usefixtures("no_grad")


class Three(NamedTuple):
    q_conv_state: Tensor
    k_conv_state: Tensor
    sums: Tensor


class Sums(Mixer[Three]):
    """Two convolutions in a row, then the sum of all tokens so far."""

    Caches = Three

    def __init__(self) -> None:
        super().__init__(8)
        self.q, self.k = Taps(8, 8, 4, groups=8), Taps(8, 8, 3, groups=8)
        self.out_proj = nn.Linear(8, 8)

    @answering
    def forward(
        self,
        hidden_states: Tensor,
        q_conv_state: Tensor | None = None,
        k_conv_state: Tensor | None = None,
        sums: Tensor | None = None,
        **rows: Any,
    ) -> Tensor:
        return self._read(hidden_states, None, SequenceArgs(**rows), q_conv_state, k_conv_state, sums)

    @answering
    def step(self, hidden_states: Tensor, q_conv_state: Tensor, k_conv_state: Tensor, sums: Tensor) -> Tensor:
        return self._advance(hidden_states, DecodeArgs(), q_conv_state, k_conv_state, sums)

    def _like(self) -> Tensor:
        return self.q.weight

    def _kinds(self) -> tuple[Cache, ...]:
        return Cache((8, 3), is_window=True), Cache((8, 2), is_window=True), Cache((8,))

    def _prefill(self, hidden_states: Tensor, caches: Three, rows: SequenceArgs) -> Tensor:
        require_caches("Sums", hidden_states, caches, self._kinds())
        x = rows.bind(causal_conv1d)(hidden_states, *self.q(), conv_state=caches.q_conv_state)
        y = rows.bind(causal_conv1d)(x, *self.k(), conv_state=caches.k_conv_state).cumsum(1)
        if caches.sums is not None:
            caches.sums.copy_(y[:, -1])
        return self.out_proj(y)

    def _decode(self, hidden_states: Tensor, caches: Three, rows: DecodeArgs) -> Tensor:
        require_caches("Sums", hidden_states, caches, self._kinds())
        x = rows.bind(causal_conv1d_update)(hidden_states, caches.q_conv_state, *self.q())
        y = rows.bind(causal_conv1d_update)(x, caches.k_conv_state, *self.k())
        return self.out_proj(caches.sums.add_(y))


def test_caches_have_names() -> None:
    for name in KINDS:
        layer = new_layer(name, "cpu")
        caches = layer.empty_caches(3)
        assert isinstance(caches, layer.Caches)
        pooled = StatePool.of({name: layer}, 2).caches[name]
        assert type(pooled) is type(caches)
        assert type(copy.deepcopy(pooled)) is type(caches)


def test_a_pair_is_taken_apart_as_ever() -> None:
    layer = Mamba2(HIDDEN, heads=2, head_dim=8, dstate=4)
    conv_state, ssm_state = caches = layer.empty_caches(2)
    assert isinstance(caches, ConvAndState)
    assert caches == (conv_state, ssm_state)
    assert layer(torch.randn(2, 3, HIDDEN), conv_state=conv_state, ssm_state=ssm_state).shape == (2, 3, HIDDEN)
    assert conv_state.any()
    assert ssm_state.any()


@pytest.mark.parametrize("columns", [1, 3])
def test_windows_are_as_long_as_speculation_needs(columns: int) -> None:
    caches = Sums().empty_caches(4, dtype=torch.bfloat16, columns=columns)
    assert [tuple(cache.shape) for cache in caches] == [(4, 8, 2 + columns), (4, 8, 1 + columns), (4, 8)]
    assert [cache.dtype for cache in caches] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert [cache.stride(1) for cache in caches] == [1, 1, 1]
    with pytest.raises(ValueError, match="Sums: columns: got 0, expected 1 at least"):
        Sums().empty_caches(4, columns=0)


def test_a_layer_with_three_caches() -> None:
    layer = Sums()
    hidden = torch.randn(2, 9, 8)
    caches = StatePool.of({"sums": layer}, 2).caches["sums"]
    first = layer(hidden[:, :5], *caches)
    rest = [layer.step(token, **caches._asdict()) for token in hidden[:, 5:].unbind(1)]
    torch.testing.assert_close(torch.cat([first, torch.stack(rest, 1)], 1), layer(hidden))


WRONG = {
    "fewer slots of k": lambda q, k, s: (q, k[:1], s),
    "k too short": lambda q, k, s: (q, k[..., 1:], s),
    "other channels of k": lambda q, k, s: (q, k[:, 1:], s),
    "k of numbers": lambda q, k, s: (q, k.int(), s),
    "sums of numbers": lambda q, k, s: (q, k, s.int()),
    "no sums": lambda q, k, s: (q, k, None),
    "only sums": lambda q, k, s: (None, None, s),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.usefixtures("fresh_dynamo")
def test_no_cache_is_written_where_another_is_wrong(wrong: str, compiled: bool) -> None:
    layer = Sums()
    caches = WRONG[wrong](*layer.empty_caches(2, columns=2))
    if wrong == "k too short":
        caches = (caches[0], caches[1][..., 1:], caches[2])
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    sentence = r"q_conv_state, k_conv_state, sums: got .*, .* and .*, expected none or all of them: on one device, as "
    sentence += r"many slots, k_conv_state \(slots, 8, at least 2\), sums \(slots, 8\) of a float dtype"
    with pytest.raises(ValueError, match=sentence if compiled else f"^Sums: {sentence}"):
        call(torch.randn(2, 5, 8), *caches)
    assert not any(cache.any() for cache in caches if cache is not None)
