"""What all layers have in common: their calls and their caches."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from mamba_ops.layers.caches import Cache, Caches, ConvAndNarrowState, ConvAndState, narrow_kinds
from mamba_ops.ops._common.checking import floating_dtype, short, whole_number
from mamba_ops.ops._common.narrow import MOST
from mamba_ops.ops._common.sequences import NULL_SLOT, DecodeArgs, HasPlan, SequenceArgs
from mamba_ops.registry import answering, bad_argument
from mamba_ops.registry.errors import ArgumentTypeError, in_call_of

C = TypeVar("C", bound=Caches)


class Mixer(nn.Module, Generic[C]):
    """A layer that mixes the tokens of each sequence, `(..., hidden_size)` to the same shape.

    A call reads sequences from their beginning, or continues them from a cache (prefill); `step` reads the next token
    of every sequence (decode). Caches are passed in and changed in place; what is returned is the output.

    A layer says what its caches are: `Caches`, a NamedTuple of any number of them, and `_kinds`. Its `forward` and its
    `step` take them by their names, and hand them to `_read` and `_decode`.
    """

    Caches: type[C]
    """The NamedTuple of the layer's caches; in a call without caches each of them is None."""
    NarrowCaches: type[Any] | None = None
    """The same for states of int16 or float8_e4m3fn, where ops take them: with their scales."""
    out_proj: nn.Linear
    step: Callable[..., Tensor]
    """Reads the next token of every sequence."""
    share: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)
    """Called with what heads share; `mamba_ops.distributed` sets it where heads are on several ranks."""
    checkpoint_map: Any = None
    """Which part of a whole layer this is; `mamba_ops.distributed` sets it."""
    takes_plans: bool = True
    """Whether there is a mixing op for it."""
    is_divisible: ClassVar[bool] = True
    """Whether `mamba_ops.distributed` can put its heads on several ranks."""
    _of_models: ClassVar[dict[str, type[Any]]] = {}

    def __init_subclass__(cls, of_model: str | None = None, **more: Any) -> None:
        """Note a layer of its own of a model of Transformers, by the model_type of its config."""
        super().__init_subclass__(**more)
        if of_model is not None:
            Mixer._of_models[of_model] = cls

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    @classmethod
    def _own_of(cls, config: Any) -> type[Any] | None:
        """Return the kind of this layer that a config's model has to itself, if there is one."""
        own = Mixer._of_models.get(getattr(config, "model_type", ""))
        return own if own is not None and own is not cls and issubclass(own, cls) else None

    def empty_caches(
        self,
        slots: int,
        *,
        dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        columns: int = 1,
    ) -> C:
        """Return the layer's caches, of zeros, for `slots` sequences, on the parameters' device.

        They are a NamedTuple: `conv_state, ssm_state = layer.empty_caches(4)`, `layer(hidden, *caches)`.

        Args:
            slots: how many sequences they hold.
            dtype: of what is kept of inputs (conv_state); None: that of the parameters.
            state_dtype: of states (ssm_state), which sum over a whole sequence. With int16 or float8_e4m3fn there is a
                cache more, `state_scale`, float32: see `mamba_ops.selective_state_update`.
            columns: the most tokens of a speculative decode, as for plans. Any but the first may be discarded, so a
                convolution keeps `columns - 1` more inputs.

        Raises:
            ValueError: a number is no whole number, a dtype is none of floating-point numbers, or none that the layer's
                states can have.
        """
        kinds = self._kinds()
        is_narrow = state_dtype in MOST and any(not kind.is_window and not kind.of_inputs for kind in kinds)
        try:
            whole_number("slots", slots, least=0)
            whole_number("columns", columns)
            floating_dtype("dtype", dtype)
            if state_dtype not in MOST:
                floating_dtype("state_dtype", state_dtype, others="torch.int16")
            elif is_narrow and self.NarrowCaches is None:
                expected, hint = "a float of 16 bits or more", "no op of this layer takes a narrow state"
                raise bad_argument("state_dtype", got=short(state_dtype), expected=expected, hint=hint)
        except ValueError as error:
            raise in_call_of(type(self).__name__, error) from None
        like, found = self._like(), []
        for kind in narrow_kinds(kinds) if is_narrow else kinds:
            if kind.is_window:
                channels, length = kind.sizes
                window = like.new_zeros((slots, length + columns - 1, channels), dtype=dtype)
                found.append(window.transpose(1, 2))  # dense channels
            else:
                of_state = state_dtype if len(kind.dtypes) > 1 else kind.dtypes[0]
                found.append(like.new_zeros((slots, *kind.sizes), dtype=dtype if kind.of_inputs else of_state))
        return self._named(found)

    def _named(self, caches: Sequence[Tensor | None]) -> C:
        """Return the layer's caches by name."""
        if self.NarrowCaches is not None and len(caches) == len(self.NarrowCaches._fields):
            return cast(C, self.NarrowCaches(*caches))
        return self.Caches(*caches)

    def _read(self, hidden_states: Tensor, plan: HasPlan | None, rows: SequenceArgs, *caches: Tensor | None) -> Tensor:
        """Answer a call of the layer, `forward`."""
        if plan is None:
            self._check_call(hidden_states, rows.null_slot)
            return self._prefill(hidden_states, self._named(caches), rows)
        if not hasattr(plan, "tensors"):
            raise self._wrong("plan", f"a {type(plan).__name__}", "a mamba_ops.serving.Plan")
        if any(cache is None for cache in caches):
            which = {1: "its cache", 2: "both caches"}.get(len(caches), "all caches")
            raise self._wrong("plan", "a plan without caches", f"{which}; see empty_caches()")
        self._check_call(hidden_states, rows.null_slot)
        return self._forward_plan(hidden_states, self._named(caches), plan)

    def _advance(self, hidden_states: Tensor, rows: DecodeArgs, *caches: Tensor) -> Tensor:
        """Answer a call of `step`."""
        self._check_call(hidden_states, rows.null_slot)
        return self._decode(hidden_states, self._named(caches), rows)

    def _check_call(self, hidden_states: Tensor, null_slot: int) -> None:
        """Raise the error that the projection would raise in words of its own, or only the op after the convolution.

        It reads what Dynamo knows while it traces, so nothing of it is in the graph.
        """
        if not isinstance(hidden_states, Tensor):
            raise self._wrong("hidden_states", f"a {type(hidden_states).__name__}", "a torch.Tensor", ArgumentTypeError)
        if not isinstance(null_slot, int | torch.SymInt):
            raise self._wrong("null_slot", repr(null_slot), "a whole number", ArgumentTypeError)
        shape, dtype, device = hidden_states.shape, hidden_states.dtype, hidden_states.device
        if len(shape) not in (2, 3) or shape[-1] != self.hidden_size:
            expected = f"(batch, length, {self.hidden_size}) or (tokens, {self.hidden_size})"
            raise self._wrong("hidden_states", f"shape {tuple(shape)}", expected)
        if not hidden_states.is_floating_point() or hidden_states.layout is not torch.strided:
            got = f"{dtype} in the layout {hidden_states.layout}"
            raise self._wrong("hidden_states", got, "floating-point numbers in a strided tensor")
        weight = self.out_proj.weight if type(self.out_proj) is nn.Linear else None  # another one may convert
        if weight is None or (weight.dtype, weight.device) == (dtype, device):
            return
        if weight.device != device or not torch.is_autocast_enabled(device.type):
            got, expected = f"{dtype} on {device}", f"{weight.dtype} on {weight.device}, as the layer's parameters are"
            raise self._wrong("hidden_states", got, expected)

    def _wrong(self, name: str, got: str, expected: str, kind: type[ValueError] = ValueError) -> ValueError:
        return kind(f"{type(self).__name__}: {name}: got {got}, expected {expected}")

    # -- what a layer implements; `rows` binds the convolution and the recurrence -------------------------------------

    def _like(self) -> Tensor:
        """Return a parameter with the device and the dtype of the layer's parameters."""
        raise NotImplementedError

    def _kinds(self) -> tuple[Cache, ...]:
        """Return what each of the layer's caches is."""
        raise NotImplementedError

    def _prefill(self, hidden_states: Tensor, caches: C, rows: SequenceArgs) -> Tensor:
        raise NotImplementedError

    def _decode(self, hidden_states: Tensor, caches: C, rows: DecodeArgs) -> Tensor:
        raise NotImplementedError

    def _forward_plan(self, hidden_states: Tensor, caches: C, plan: HasPlan) -> Tensor:
        raise self._wrong("plan", "a plan", "None: there is no mixing op for this layer")


class RecurrentMixer(Mixer[ConvAndState]):
    """A mixer with one convolution and one recurrence."""

    Caches = ConvAndState
    NarrowCaches = ConvAndNarrowState
    conv1d: "Taps"

    @answering
    def forward(
        self,
        hidden_states: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        state_scale: Tensor | None = None,
        *,
        plan: HasPlan | None = None,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        has_initial_state: Tensor | None = None,
        null_slot: int = NULL_SLOT,
    ) -> Tensor:
        """Read sequences and return their output; with caches, store each sequence's last state there.

        With a plan, the tokens are those of an engine's step: some sequences decode, others are prefilled.

        Args:
            hidden_states: `(batch, length, hidden_size)`, or packed `(tokens, hidden_size)` with `cu_seqlens`.
            conv_state, ssm_state: caches as `empty_caches` makes them, both or neither. Mutated.
            state_scale: the third of them, with states of int16 or float8_e4m3fn. Mutated.
            plan: a `mamba_ops.serving.Plan` of packed tokens, in place of the arguments after it. What is returned for
                padding tokens has no meaning.
            slots: int32 or int64 `(>= n,)`: the slot of sequence i in the caches. None: slot i.
            cu_seqlens: int32 or int64 `(n + 1,)`: sequence i is the tokens cu_seqlens[i] up to cu_seqlens[i + 1]. What
                is returned for tokens after the last sequence has no meaning.
            has_initial_state: bool `(n,)`: sequence i continues from its state in the caches. None: none does.
            null_slot: a sequence with this slot, or a negative one, is padding: it is not mixed, no cache is touched.
        """
        rows = SequenceArgs(slots, cu_seqlens, has_initial_state, null_slot)
        caches = (conv_state, ssm_state) if state_scale is None else (conv_state, ssm_state, state_scale)
        return self._read(hidden_states, plan, rows, *caches)

    @answering
    def step(
        self,
        hidden_states: Tensor,
        conv_state: Tensor,
        ssm_state: Tensor,
        state_scale: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        null_slot: int = NULL_SLOT,
    ) -> Tensor:
        """Read the next token of every sequence, advance the caches in place and return the tokens' output.

        Args:
            hidden_states: `(n, hidden_size)`, or the next few tokens of every sequence `(n, length, hidden_size)`.
            conv_state, ssm_state, state_scale, slots, null_slot: as for a call of the layer.
        """
        caches = (conv_state, ssm_state) if state_scale is None else (conv_state, ssm_state, state_scale)
        return self._advance(hidden_states, DecodeArgs(slots, null_slot=null_slot), *caches)

    def _like(self) -> Tensor:
        return self.conv1d.weight

    def _kinds(self) -> tuple[Cache, ...]:
        channels, _, width = self.conv1d.weight.shape
        return Cache((channels, width - 1), is_window=True), Cache(self._state())

    def _state(self) -> tuple[int, ...]:
        """Return the sizes of one slot of ssm_state."""
        raise NotImplementedError


class Taps(nn.Conv1d):
    """The parameters of a depthwise convolution, under nn.Conv1d's names; a call returns them as ops take them."""

    def forward(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Return the weight, `(dim, width)`, and the bias, `(dim,)` or None."""
        return self.weight.squeeze(1), self.bias


def side_by_side(hidden_states: Tensor, *projections: Callable[[Tensor], Tensor]) -> Tensor:
    """Return projections of the same tokens in one tensor.

    Compiled, each product writes to its part of it, and nothing is copied: Inductor does so for matrices alone.
    """
    tokens = hidden_states.flatten(0, -2)
    found = torch.cat([project(tokens) for project in projections], dim=-1)
    return found.view(*hidden_states.shape[:-1], found.shape[-1])


def require_silu(layer: str, activation: str) -> None:
    """Raise ValueError unless a config's activation is the one that the convolution's ops have."""
    if activation not in ("silu", "swish"):
        raise ValueError(f"{layer}.from_config: hidden_act: got {activation!r}, expected 'silu' (or 'swish')")
