"""The gated short convolution layer. Its parameters are named as in Transformers, so that it loads checkpoints of LFM2
and LFM3.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mamba_ops.layers.caches import Cache
from mamba_ops.layers.checking import check_layer
from mamba_ops.layers.configs import reading_config
from mamba_ops.layers.mixer import Mixer, Taps
from mamba_ops.ops import causal_conv1d, causal_conv1d_update, short_conv_mixing
from mamba_ops.ops._common.sequences import NULL_SLOT, DecodeArgs, HasPlan, SequenceArgs
from mamba_ops.registry import answering


class Window(NamedTuple):
    """The cache of a layer with a convolution and no state.

    Attributes:
        conv_state: `(slots, channels, width - 1)`, the last inputs of the convolution.
    """

    conv_state: Tensor


class ShortConv(Mixer[Window]):
    """Mix the tokens of each sequence, `(..., hidden_size)` to the same shape, with a gated short convolution.

    One projection makes B, C and x of each token; what is returned is `out_proj(C * conv(B * x))`, where the
    convolution is causal, by channel, and without an activation.

    A call reads sequences from their beginning, or continues them from a cache (prefill); `step` reads the next token
    of every sequence (decode). The cache is passed in and changed in place; what is returned is the output.

    Rows of several lengths are packed (`cu_seqlens`). In a batch that is padded on the left, padding tokens have to be
    zero in `hidden_states`, and then leave no trace where there is no bias.

    Args:
        hidden_size: size of the residual stream, and channels of the convolution.
        d_conv: width of the convolution, 2 to 8.
        bias: whether the two projections and the convolution have a bias.
        device, dtype: of the parameters.
    """

    Caches = Window

    def __init__(
        self,
        hidden_size: int,
        *,
        d_conv: int = 3,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size)
        sizes = {"hidden_size": hidden_size}
        check_layer("ShortConv", sizes=sizes, d_conv=d_conv, numbers={}, dtypes={"dtype": dtype}, device=device)
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias, **new)
        self.conv = Taps(hidden_size, hidden_size, d_conv, groups=hidden_size, bias=bias, **new)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias, **new)

    @classmethod
    def from_config(
        cls, config: Any, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "ShortConv":
        """Return the layer that a config of Transformers describes, with new parameters.

        Args:
            config: an `Lfm2Config`, `Lfm2MoeConfig` or `Lfm3Config`.
            device, dtype: of the parameters.

        Raises:
            ValueError: the config is none of these.
        """
        with reading_config("ShortConv", "Transformers' Lfm2Config, Lfm2MoeConfig or Lfm3Config"):
            sizes = {"d_conv": config.conv_L_cache, "bias": config.conv_bias}
            return cls(config.hidden_size, **sizes, device=device, dtype=dtype)

    @answering
    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor | None = None,
        *,
        plan: HasPlan | None = None,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        has_initial_state: Tensor | None = None,
        null_slot: int = NULL_SLOT,
    ) -> Tensor:
        """Read sequences and return their output; with a cache, store each sequence's last inputs there.

        With a plan, the tokens are those of an engine's step: some sequences decode, others are prefilled.

        Args:
            hidden_states: `(batch, length, hidden_size)`, or packed `(tokens, hidden_size)` with `cu_seqlens`.
            conv_state: the cache, as `empty_caches` makes it. Mutated.
            plan: a `mamba_ops.serving.Plan` of packed tokens, in place of the arguments after it. What is returned for
                padding tokens has no meaning.
            slots: int32 or int64 `(>= n,)`: the slot of sequence i in the cache. None: slot i.
            cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1]. What
                is returned for tokens after the last sequence has no meaning.
            has_initial_state: bool `(n,)`: sequence i continues from its inputs in the cache. None: none does.
            null_slot: a sequence with this slot, or a negative one, is padding: it is not mixed, no cache is touched.
        """
        return self._read(
            hidden_states, plan, SequenceArgs(slots, cu_seqlens, has_initial_state, null_slot), conv_state
        )

    @answering
    def step(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        *,
        slots: Tensor | None = None,
        null_slot: int = NULL_SLOT,
    ) -> Tensor:
        """Read the next token of every sequence, advance the cache in place and return the tokens' output.

        Args:
            hidden_states: `(n, hidden_size)`, or the next few tokens of every sequence `(n, length, hidden_size)`.
            conv_state, slots, null_slot: as for a call of the layer.
        """
        return self._advance(hidden_states, DecodeArgs(slots, null_slot=null_slot), conv_state)

    def mix(self, projected: Tensor, conv_state: Tensor, plan: HasPlan, *, out: Tensor | None = None) -> Tensor:
        """Run `short_conv_mixing` with the layer's parameters: all between its projections."""
        return plan.tensors.bind(short_conv_mixing)(
            projected, conv_state, *self.conv(), null_slot=plan.null_slot, out=out
        )

    def _like(self) -> Tensor:
        return self.conv.weight

    def _kinds(self) -> tuple[Cache, ...]:
        channels, _, width = self.conv.weight.shape
        return (Cache((channels, width - 1), is_window=True),)

    def _prefill(self, hidden_states: Tensor, caches: Window, rows: SequenceArgs) -> Tensor:
        B, C, x = cast(Tensor, self.in_proj(hidden_states)).chunk(3, dim=-1)
        y = rows.bind(causal_conv1d)(B * x, *self.conv(), conv_state=caches.conv_state, silu=False)
        return cast(Tensor, self.out_proj(C * y))

    def _decode(self, hidden_states: Tensor, caches: Window, rows: DecodeArgs) -> Tensor:
        B, C, x = cast(Tensor, self.in_proj(hidden_states)).chunk(3, dim=-1)
        y = rows.bind(causal_conv1d_update)(B * x, caches.conv_state, *self.conv(), silu=False)
        return cast(Tensor, self.out_proj(C * y))

    def _forward_plan(self, hidden_states: Tensor, caches: Window, plan: HasPlan) -> Tensor:
        return cast(Tensor, self.out_proj(self.mix(self.in_proj(hidden_states), *caches, plan)))
