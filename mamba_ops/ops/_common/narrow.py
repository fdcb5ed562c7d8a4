"""States in int16 or float8_e4m3fn, with a scale for each row: how they are widened, narrowed, checked and stored.

A row is the last axis of a state. It stands for its numbers times its scale, which lets the largest of them be the
largest number of the format.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mamba_ops.ops._common.checking import NARROW, floating, shape_is, short
from mamba_ops.ops._common.chunk_layout import row_count
from mamba_ops.ops._common.rounding import round_stochastically
from mamba_ops.ops._common.sequences import SequenceArgs
from mamba_ops.ops._common.slots import Ends, row_ends, store_rows
from mamba_ops.registry import bad_argument, settings

MOST = dict(zip(NARROW, (32767.0, 448.0), strict=True))
"""Each format's largest number."""
ROUNDED = (torch.float16, *MOST)
"""The formats that are rounded stochastically where a seed is given."""
SMALLEST = 2.0**-126  # a scale, of zeros too: what it is divided by, and its inverse, are ordinary numbers of float32
_NARROW = " or ".join(map(short, MOST))
MAKE_BOTH = "mamba_ops.functional.narrow_states makes both"


def widen(states: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the numbers that states stand for, in a dtype; without a scale they are what they are."""
    wide = states.to(dtype)
    return wide if scale is None else wide * scale.to(dtype).unsqueeze(-1)


def narrow(
    states: Tensor, dtype: torch.dtype, seed: Tensor | None = None, slots: Tensor | None = None, rounds: int = 0
) -> tuple[Tensor, Tensor]:
    """Return states, (n, ..., dstate), in a format, and the scales of their rows, float32 (n, ...).

    A row's scale is its largest size divided by the format's, and 2^-126 at least. Its numbers, multiplied by the
    inverse of that, are rounded to the nearest, to even ones in the middle; or stochastically, with a seed, which needs
    the slots (n,). A row in which one is infinite or NaN has the scale NaN and zeros: it is NaN when it is read.
    """
    most, states = MOST[dtype], states.to(torch.promote_types(states.dtype, torch.float32))
    largest = states.abs().amax(-1)
    # by a tensor: torch multiplies by the inverse of a number on a GPU, and that rounds twice
    scale = (largest / torch.full_like(largest, most)).to(torch.float32).clamp(min=SMALLEST)
    finite = torch.isfinite(scale)
    scale = torch.where(finite, scale, torch.nan)
    numbers = (states * (1 / scale).unsqueeze(-1)).clamp(-most, most)
    numbers = torch.where(finite.unsqueeze(-1), numbers, 0)
    if seed is not None and slots is not None:
        return round_stochastically(numbers, seed, slots, rounds, dtype), scale
    return (torch.round(numbers) if dtype == torch.int16 else numbers).to(dtype), scale


def as_bytes(states: Tensor) -> Tensor:
    """Return 8-bit floats as bytes, for the functions of torch that do not know them; anything else as it is."""
    return states.view(torch.uint8) if states.dtype == torch.float8_e4m3fn else states


def read_states(call: Any, slots: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Return the states in some slots of a call's `ssm_state`, widened."""
    states = as_bytes(call.ssm_state)[slots].view(call.ssm_state.dtype)
    return widen(states, None if call.state_scale is None else call.state_scale[slots], dtype)


def store_states(call: Any, slots: Tensor, states: Tensor, is_active: Tensor | None) -> None:
    """Store the state of each active row in its slot, rounded as the call asks for; None: rows i in slots i."""
    scale = None
    if call.state_scale is not None:
        states, scale = narrow(states, call.ssm_state.dtype, call.rounding_seed, slots, call.philox_rounds)
    elif call.rounding_seed is not None:
        states = round_stochastically(states, call.rounding_seed, slots, call.philox_rounds)
    for cache, values in ((call.ssm_state, states), (call.state_scale, scale)):
        if cache is not None and values is not None:
            if is_active is None:
                cache[: values.shape[0]].copy_(values)
            else:
                store_rows(as_bytes(cache), slots, as_bytes(values), is_active)


class Wide(NamedTuple):
    """The states that an op over sequences goes on from, and that it leaves.

    Attributes:
        states: of all slots, the cache itself; or, where that is narrow, of the op's rows, in float32 at least.
        rows: the op's arguments about its rows, for these states.
        cache, scale: where the states of rows belong.
        ends: where among them; None where they are there already.
    """

    states: Tensor | None
    rows: SequenceArgs
    cache: Tensor | None
    scale: Tensor | None
    ends: Ends | None = None

    def keep(self) -> None:
        """Narrow the states that the op left, to the nearest, and store them."""
        if self.ends is None or self.states is None or self.cache is None or self.scale is None:
            return
        states, scale = narrow(self.states, self.cache.dtype)
        store_rows(as_bytes(self.cache), self.ends.target, as_bytes(states), self.ends.stored)
        store_rows(self.scale, self.ends.target, scale, self.ends.stored)


def widened(cache: Tensor | None, scale: Tensor | None, rows: SequenceArgs, x: Tensor) -> Wide:
    """Return the states that an op over sequences x goes on from, by its arguments about rows."""
    if cache is None or scale is None:
        return Wide(cache, rows, cache, scale)
    n, cu_seqlens, device = row_count(x, rows.cu_seqlens), rows.cu_seqlens, cache.device
    empty = torch.full((n,), x.shape[1] == 0, device=device) if cu_seqlens is None else cu_seqlens.diff() <= 0
    ends = row_ends(rows.slots, rows.write_slots, rows.null_slot, empty, cache)
    states = cache.new_zeros((n, *cache.shape[1:]), dtype=torch.promote_types(x.dtype, torch.float32))
    if rows.has_initial_state is not None:
        carried = ends.is_active & rows.has_initial_state
        source = torch.where(carried, ends.source, 0)
        found = widen(as_bytes(cache)[source].view(cache.dtype), scale[source], states.dtype)
        states = torch.where(carried.view(-1, *[1] * (cache.dim() - 1)), found, states)
    slots = torch.where(ends.is_active, torch.arange(n, device=device), -1)
    return Wide(states, rows._replace(slots=slots, write_slots=None, null_slot=-1), cache, scale, ends)


# -- checks and settings ----------------------------------------------------------------------------------------------


def check_state(ssm_state: Tensor, state_scale: Tensor | None, axes: str) -> None:
    """`ssm_state` has a float dtype; or it is narrow, and `state_scale`, of `axes`, has a number for each row."""
    if ssm_state.dtype not in MOST:
        floating(ssm_state=ssm_state)
        if state_scale is not None:
            got, hint = short(ssm_state.dtype), f"state_scale is given; {MAKE_BOTH}"
            raise bad_argument("ssm_state", got=got, expected=_NARROW, hint=hint)
    elif state_scale is None:
        got, expected = f"none for a state of {short(ssm_state.dtype)}", f"float32 {axes}, a scale for each row"
        raise bad_argument("state_scale", got=got, expected=expected, hint=MAKE_BOTH)
    elif state_scale.dtype != torch.float32:
        raise bad_argument("state_scale", got=short(state_scale.dtype), expected="float32", hint=MAKE_BOTH)
    else:
        shape_is("state_scale", state_scale, tuple(ssm_state.shape[:-1]), hint=f"{axes}, a number for each row")


def check_rounding(ssm_state: Tensor, rounding_seed: Tensor | None, philox_rounds: int) -> None:
    """`rounding_seed`, where it is given, is one int64, and the state is of a format that is rounded by it."""
    if rounding_seed is not None:
        if rounding_seed.dtype != torch.int64:
            hint = "one number from torch.randint will do"
            raise bad_argument("rounding_seed", got=short(rounding_seed.dtype), expected="int64", hint=hint)
        shape_is("rounding_seed", rounding_seed, (1,), ())
        if ssm_state.dtype not in ROUNDED:
            hint = "rounding_seed asks for stochastic rounding, which is for these"
            expected = f"{short(torch.float16)}, {_NARROW}"
            raise bad_argument("ssm_state", got=short(ssm_state.dtype), expected=expected, hint=hint)
    if not 0 <= philox_rounds <= 100:  # a kernel is compiled for each number, and every round is one of its steps
        raise bad_argument("philox_rounds", got=philox_rounds, expected="1 to 100, or 0 for 10")


def default_seed(ssm_state: Tensor, rounding_seed: Tensor | None, philox_rounds: int) -> dict[str, Any]:
    """Draw a seed for a state that can be rounded by it, if the configuration asks for stochastic rounding and the
    caller brought none.

    The op's body does so, not the front: so a swap of the configuration recompiles nothing, and a graph that captured
    the call draws another seed in every replay.
    """
    now = settings()
    given: dict[str, Any] = {}
    if rounding_seed is None and now.get("stochastic_rounding") and ssm_state.dtype in ROUNDED:
        given["rounding_seed"] = torch.randint(0, 2**63 - 1, (1,), device=ssm_state.device)
    if (given or rounding_seed is not None) and not philox_rounds and now.get("philox_rounds"):
        given["philox_rounds"] = now["philox_rounds"]
    return given


def meant(ssm_state: Tensor, state_scale: Tensor | None) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Return the numbers that a narrow state stands for, and how far apart neighbours are there; scales are no numbers
    of their own.
    """
    if state_scale is None:
        return {}
    wide, scale = widen(ssm_state, state_scale, torch.float64), state_scale.double().abs().unsqueeze(-1)
    step = scale.expand_as(wide) if ssm_state.dtype == torch.int16 else torch.maximum(wide.abs() / 8, scale / 512)
    return {"ssm_state": (wide, step), "state_scale": None}
