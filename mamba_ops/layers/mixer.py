"""What all layers have in common: how they are called, and their caches."""

from typing import Any

import torch
from torch import Tensor, nn

from mamba_ops.ops._common.sequences import HasPlan


class Mixer(nn.Module):
    """A layer that mixes the tokens of each sequence, `(..., hidden_size)` to the same shape.

    Calling it reads sequences from their beginning or on from a cache (prefill); `step` reads one token more of every
    sequence (decode). Caches are passed in and changed in place; what is returned is the output.
    """

    conv1d: nn.Conv1d  # for its parameters, never called

    def empty_caches(
        self, slots: int, *, dtype: torch.dtype | None = None, state_dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return a `(conv_state, ssm_state)` of zeros for `slots` sequences, on the parameters' device.

        Args:
            slots: how many sequences they hold.
            dtype: of conv_state; None: that of the parameters.
            state_dtype: of ssm_state, which sums over a whole sequence.
        """
        weight = self.conv1d.weight
        dim, _, width = weight.shape
        conv_state = weight.new_zeros((slots, width - 1, dim), dtype=dtype).transpose(1, 2)  # channels lie together
        return conv_state, weight.new_zeros((slots, *self._state()), dtype=state_dtype)

    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        *,
        plan: HasPlan | None = None,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        has_initial_state: Tensor | None = None,
        null_slot: int = -1,
    ) -> Tensor:
        """Read sequences and return their output; with caches, leave each sequence's last state there.

        With a plan, the tokens are those of an engine's step: some sequences decode, others are read.

        Args:
            hidden_states: `(batch, length, hidden_size)`, or packed `(tokens, hidden_size)` with `cu_seqlens`.
            conv_state, ssm_state: caches as `empty_caches` makes them, both or neither. Mutated.
            plan: a `mamba_ops.serving.Plan` of packed tokens; it says all that the arguments after it would, and what
                is returned for tokens of nobody means nothing.
            slots: int32 or int64 `(>= n,)`: where in the caches sequence i is. None: in slot i.
            cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1]; what
                is returned for tokens past the last sequence means nothing.
            has_initial_state: bool `(n,)`: sequence i goes on from its state in the caches. None: none does.
            null_slot: a sequence whose slot is this or negative is nobody: it is not mixed, and no cache is touched.
        """
        if plan is not None:
            if conv_state is None or ssm_state is None:
                got = "a plan without caches"
                raise ValueError(f"{type(self).__name__}: plan: got {got}, expected both caches; see empty_caches()")
            return self._mix(hidden_states, conv_state, ssm_state, plan)
        rows: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "slots": slots,
            "has_initial_state": has_initial_state,
            "null_slot": null_slot,
        }
        return self._read(hidden_states, conv_state, ssm_state, rows)

    def step(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        *,
        slots: Tensor | None = None,
        null_slot: int = -1,
    ) -> Tensor:
        """Read one token more of every sequence, advance the caches in place and return the tokens' output.

        Args:
            hidden_states: `(n, hidden_size)`, or a few tokens more of every sequence `(n, length, hidden_size)`.
            conv_state, ssm_state, slots, null_slot: as for a call of the layer.
        """
        return self._step(hidden_states, conv_state, ssm_state, {"slots": slots, "null_slot": null_slot})

    # -- what a layer fills in; `rows` are keywords of both the convolution and the recurrence ------------------------

    def _state(self) -> tuple[int, ...]:
        """Return the sizes of one slot of ssm_state."""
        raise NotImplementedError

    def _read(
        self, hidden_states: Tensor, conv_state: Tensor | None, ssm_state: Tensor | None, rows: dict[str, Any]
    ) -> Tensor:
        raise NotImplementedError

    def _mix(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, plan: HasPlan) -> Tensor:
        raise NotImplementedError

    def _step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, rows: dict[str, Any]) -> Tensor:
        raise NotImplementedError


def require_silu(layer: str, activation: str) -> None:
    """Raise ValueError unless a config's activation is the one that the convolution's ops have."""
    if activation not in ("silu", "swish"):
        raise ValueError(f"{layer}.from_config: hidden_act: got {activation!r}, expected 'silu' (or 'swish')")
