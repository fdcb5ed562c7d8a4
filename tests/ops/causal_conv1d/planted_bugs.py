"""Bugs to plant in causal_conv1d."""

BUGS = {
    "window off by one": ("window[k] * taps[k]", "window[(k + 1) % WIDTH] * taps[k]"),
    "taps reversed": ("window[k] * taps[k]", "window[k] * taps[WIDTH - 1 - k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("            if SILU:", "            if True:"),
    "sequences see the one before": ("(tile > 0), other=0.0)", "(tile >= 0), other=0.0)"),
    "first tile only": ("number % tiles", "number * 0"),
    "initial state ignored": ("& carried", "& (state_slot < 0)"),
    "initial state assumed": (" & carried", ""),
    "state not written": ("kept[k], mask=inside)", "kept[k], mask=inside & (tokens < 0))"),
    "state of short sequences forgotten": ("tl.where(place < HISTORY, old, new)", "new"),
    "state not moved by short sequences": ("source_ptr + place * state_column", "source_ptr + k * state_column"),
    "write slot ignored": ("state_ptr + target * state_slot", "state_ptr + slot * state_slot"),
    "past of empty sequences not moved": ("tl.maximum(tokens, 1)", "tokens"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "inputs loaded ahead are of the step before": ("window += (inputs[u]", "window += (coming[u]"),
}

SLOW_BUGS = {  # slow: caught by the last samples, or by long ones
    "tiles start from zeros": ("(tile > 0), other=0.0)", "(tile < 0), other=0.0)"),
    "tiles of the wrong sequence": ("+ middle <= number:", "+ middle < number:"),
    "null sequences not zeroed": ("tl.store(to_token, 0.0", "tl.store(to_token, 1.0"),
    "runs start from zeros": ("tl.load(before, mask=inside[", "tl.load(before, mask=(inside & (tile < 0))["),
    "runs see the sequence before": ("(token >= RUN) & (token < tokens + RUN)", "(token < tokens + RUN)"),
    "past of runs in the wrong column": ("tl.where(column == j,", "tl.where(column == j + 1,"),
    "entries of runs in another order": ("halves += (left, right)", "halves += (right, left)"),
}
