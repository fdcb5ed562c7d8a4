"""Checks of arguments that several ops make.

Each function returns quietly or raises the ValueError that names the argument, what it is and what it should be.
None of them reads a stride or a value, so that the result holds for every call with the same shapes and dtypes.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from mamba_ops.registry.errors import bad_argument

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INDICES = (torch.int32, torch.int64)
NARROW = (torch.int16, torch.float8_e4m3fn)
"""The formats of narrow states."""
_WIDE_STATES = ("ssm_state", "initial_states")
MOST_OF_A_CHUNK = 4096
"""The most tokens of a chunk."""
_SEQUENCE_ARGUMENTS = frozenset(
    ["cu_seqlens", "slots", "write_slots", "has_initial_state", "num_computed_tokens", "num_accepted_tokens"]
)


def tensor_rank(name: str, tensor: Tensor, layouts: dict[int, str], *, hint: str = "") -> None:
    """`tensor` has one of the ranks in `layouts`, which says for each what the axes are: `{2: "(tokens, dim)"}`."""
    if tensor.dim() not in layouts:
        raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=" or ".join(layouts.values()), hint=hint)


def shape_is(name: str, tensor: Tensor | None, *shapes: tuple[int, ...], hint: str = "") -> None:
    """`tensor`, where it is given, has one of `shapes`."""
    if tensor is not None and tensor.shape not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise bad_argument(name, got=f"shape {tuple(tensor.shape)}", expected=expected, hint=hint)


def floating(**tensors: Tensor | None) -> None:
    """Every given tensor holds ordinary floating-point numbers; they need not be of one dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _FLOATS:
            is_narrow = tensor.dtype in NARROW and name in _WIDE_STATES
            hint = "mamba_ops.functional.widen_states makes one of it" if is_narrow else "convert it first"
            raise bad_argument(name, got=short(tensor.dtype), expected=_one_of(_FLOATS), hint=hint)


def one_device(device: torch.device, of: str = "x", /, **tensors: Tensor | None) -> None:
    """Every given tensor is on `device`, which is where the argument `of` is."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            expected = f"{device}, where {of} is"
            raise bad_argument(name, got=str(tensor.device), expected=expected, hint="move one of them")


def check_tensors(call: Any, of: str, *, indices: Collection[str] = (), elsewhere: Collection[str] = ()) -> None:
    """All tensors of a call are on the device of the argument `of`, and hold floating-point numbers.

    Not held to be floating: what ops know of their sequences, and the arguments `indices`. Arguments that are checked
    `elsewhere` are left out.
    """
    tensors = {"out" if n == "output" else n: t for n, t in call._asdict().items() if isinstance(t, Tensor)}
    tensors = {n: t for n, t in tensors.items() if n not in elsewhere}
    floating(**{n: t for n, t in tensors.items() if n not in indices and n not in _SEQUENCE_ARGUMENTS})
    one_device(tensors[of].device, of, **tensors)


def index_tensor(name: str, tensor: Tensor) -> None:
    """`tensor` holds indices: int32 or int64."""
    if tensor.dtype not in _INDICES:
        raise bad_argument(name, got=short(tensor.dtype), expected=_one_of(_INDICES), hint="convert it first")


def slot_table(name: str, table: Tensor | None, *, rows: int, columns: int = 1) -> None:
    """`table`, where it is given, is `(rows,)` or `(rows, columns)`, or larger; a 1-D table is one column."""
    if table is None:
        return
    index_tensor(name, table)
    tensor_rank(name, table, {1: "(rows,)", 2: "(rows, columns)"})
    height, width = table.shape[0], table.shape[1] if table.dim() == 2 else 1
    if height < rows:
        hint = "give every row a slot; the null slot is for padding rows"
        raise bad_argument(name, got=f"{height} rows", expected=f"at least {rows}", hint=hint)
    if width < columns:
        hint = "every token of a row needs a column to keep its state in" if columns > 1 else "column 0 is the slot"
        raise bad_argument(name, got=f"{width} columns", expected=f"at least {columns}", hint=hint)


def count_of(cache: Tensor) -> int:
    """How many slots a cache has, whatever its rank is."""
    return cache.shape[0] if cache.dim() else 0


def slot_for_each(name: str, cache: Tensor, slots: Tensor | None, *, rows: int) -> None:
    """`cache` has a slot for each of `rows` rows, where no table assigns them."""
    if slots is None and cache.shape[0] < rows:
        hint = "without slots, row i uses slot i"
        raise bad_argument(name, got=f"{cache.shape[0]} slots", expected=f"at least {rows}", hint=hint)


def initial_flags(name: str, cache: Tensor | None, has_initial_state: Tensor | None, *, rows: int) -> None:
    """`has_initial_state`, where it is given, has a bool for each row, and there is a `cache` to read them from."""
    if has_initial_state is None:
        return
    if has_initial_state.dtype != torch.bool:
        raise bad_argument("has_initial_state", got=short(has_initial_state.dtype), expected="bool")
    shape_is("has_initial_state", has_initial_state, (rows,), hint="one for each row")
    if cache is None:
        raise bad_argument(name, got="none", expected="a cache", hint="has_initial_state says which rows read it")


def packed_rows(cu_seqlens: Tensor | None) -> None:
    """`cu_seqlens`, where it is given, is `(n + 1,)`: where each row starts, then where the last one ends."""
    if cu_seqlens is None:
        return
    index_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        hint = "it begins with 0 and has one entry more than there are rows"
        raise bad_argument("cu_seqlens", got=f"shape {tuple(cu_seqlens.shape)}", expected="(n + 1,)", hint=hint)


def check_chunk_size(chunk_size: int) -> None:
    """`chunk_size` is one that every backend takes: the work of a chunk, and its memory, grow with its square."""
    if not 1 <= chunk_size <= MOST_OF_A_CHUNK:
        expected = f"1 to {MOST_OF_A_CHUNK} tokens"
        raise bad_argument("chunk_size", got=chunk_size, expected=expected, hint="models use 64 to 512")


def check_limits(dt_min: float, dt_max: float) -> None:
    """The limits of step sizes are in order, and numbers that float32 holds, or infinite."""
    most = torch.finfo(torch.float32).max
    for name, limit in (("dt_min", dt_min), ("dt_max", dt_max)):
        if not (abs(limit) <= most or abs(limit) == math.inf):
            raise bad_argument(name, got=limit, expected="a number that float32 holds")
    if not dt_min <= dt_max:
        raise bad_argument("dt_min", got=dt_min, expected=f"at most dt_max, which is {dt_max}")


def accepted_tokens(num_accepted_tokens: Tensor | None, slots: Tensor | None, *, rows: int) -> None:
    """`num_accepted_tokens`, where they are given, are a number for each row, and there is a slot table."""
    if num_accepted_tokens is None:
        return
    index_tensor("num_accepted_tokens", num_accepted_tokens)
    shape_is("num_accepted_tokens", num_accepted_tokens, (rows,), hint="one for each row")
    if slots is None:
        raise bad_argument("slots", got="none", expected="a table", hint="num_accepted_tokens picks its column")


def slots_for(name: str, cache: Tensor, slots: Tensor | None) -> None:
    """`cache` has a slot where rows are told theirs, be they padding."""
    if slots is not None and slots.numel() and not cache.shape[0]:
        raise bad_argument(name, got="no slots", expected="at least 1, as slots has rows")


def whole_number(name: str, value: Any, least: int = 1) -> None:
    """`value` is a whole number, of numpy too, and `least` or more."""
    is_array = getattr(value, "ndim", 0) > 0  # numpy's have a method for the case that they are one number
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__") or is_array:
        raise bad_argument(name, got=repr(value), expected="a whole number")
    if not least <= value < 2**63:
        raise bad_argument(name, got=value, expected=f"{least} at least, and 64 bits")


def floating_dtype(name: str, dtype: Any, *, others: str = "None") -> None:
    """`dtype` is one of floating-point numbers, or None; `others` says what else may stand there."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise bad_argument(name, got=repr(dtype), expected=f"a floating-point torch.dtype, or {others}")


def device_or_none(name: str, device: Any) -> None:
    """`device` is one, the name of one, or None."""
    if device is None or isinstance(device, torch.device):
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise bad_argument(name, got=repr(device), expected="a device, its name or None", hint=reason) from None


def short(dtype: torch.dtype) -> str:
    """A dtype's name as messages have it."""
    return str(dtype).removeprefix("torch.")


def _one_of(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = map(short, dtypes)
    return f"{', '.join(most)} or {last}"
