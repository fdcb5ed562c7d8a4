"""Bugs to plant in causal_conv1d."""

BUGS = {
    "window off by one": ("window[t + k] * taps[k]", "window[t + (k + 1) % WIDTH] * taps[k]"),
    "taps reversed": ("window[t + k] * taps[k]", "window[t + k] * taps[WIDTH - 1 - k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("        if SILU:", "        if True:"),
    "sequences see the one before": ("(token >= 0)", "(token >= -first)"),
    "first tile only": ("tile %= tiles", "tile = 0"),
    "initial state ignored": ("& carried", "& (state_slot < 0)"),
    "initial state assumed": (" & carried", ""),
    "state not written": ("kept[k], mask=inside)", "kept[k], mask=inside & (tokens < 0))"),
    "state of short sequences forgotten": ("tl.where(place < HISTORY, old, new)", "new"),
    "state not moved by short sequences": ("source_ptr + place * state_column", "source_ptr + k * state_column"),
    "write slot ignored": ("state_ptr += target * state_slot", "state_ptr += slot * state_slot"),
    "past of empty sequences not moved": ("tl.maximum(tokens, 1)", "tokens"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
}

SLOW_BUGS = {  # slow: caught by the last samples, or by long ones
    "tiles start from zeros": ("(token >= 0)", "(token >= begin)"),
    "tiles of the wrong sequence": ("+ middle <= tile:", "+ middle < tile:"),
    "null sequences not zeroed": ("ALIGNED), 0.0, mask=valid)", "ALIGNED), 1.0, mask=valid)"),
}
