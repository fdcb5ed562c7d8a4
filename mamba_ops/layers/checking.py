"""Checks of what a layer is made of, before any of its parameters is."""

import math
from typing import Any

from mamba_ops.ops._common.checking import check_chunk_size, device_or_none, floating_dtype, whole_number
from mamba_ops.registry import bad_argument
from mamba_ops.registry.errors import in_call_of


def check_layer(
    layer: str,
    *,
    sizes: dict[str, Any],
    d_conv: Any = 4,
    numbers: dict[str, Any],
    dtypes: dict[str, Any],
    device: Any,
) -> None:
    """Raise the ValueError about an argument of a layer's constructor, if there is one.

    Args:
        layer: its name, for messages.
        sizes: what must be whole numbers, 1 at least, by name; `chunk_size` one that ops take.
        d_conv: must be a width that ops take; a layer without convolution leaves it out.
        numbers: what must be numbers; `eps` 0 or more.
        dtypes: what must be floating-point dtypes, or None.
        device: must be a device that is there, its name, or None.
    """
    try:
        for name, size in {**sizes, "d_conv": d_conv}.items():
            whole_number(name, size)
        if not 2 <= d_conv <= 8:
            raise bad_argument("d_conv", got=d_conv, expected="2 to 8 taps")
        if "chunk_size" in sizes:
            check_chunk_size(sizes["chunk_size"])
        for name, number in numbers.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or math.isnan(number):
                raise bad_argument(name, got=repr(number), expected="a number")
            if name == "eps" and number < 0:
                raise bad_argument(name, got=number, expected="0 or more")
        for name, dtype in dtypes.items():
            floating_dtype(name, dtype)
        device_or_none("device", device)
    except ValueError as error:
        raise in_call_of(layer, error) from None
