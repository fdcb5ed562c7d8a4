"""Bugs to plant in causal_conv1d."""

BUGS = {
    "window off by one": ("window[k].to", "window[(k + 1) % len(taps)].to"),
    "taps reversed": ("* taps[k]", "* taps[len(taps) - 1 - k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("    if SILU:", "    if True:"),
    "sequences see the one before": ("(t >= first)", "(t >= first - 1)"),
    "first tile only": ("number % tiles", "number * 0"),
    "initial state ignored": ("& carried", "& (state_slot < 0)"),
    "initial state assumed": (" & carried", ""),
    "state not written": ("kept[k], mask=inside)", "kept[k], mask=inside & (tokens < 0))"),
    "state of short sequences forgotten": ("tl.where(place < HISTORY, old, new)", "new"),
    "state not moved by short sequences": ("source_ptr + place * state_column", "source_ptr + k * state_column"),
    "write slot ignored": ("state_ptr + target * state_slot", "state_ptr + slot * state_slot"),
    "past of empty sequences not moved": ("tl.maximum(tokens, 1)", "tokens"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "last inputs of a sequence left out": ("HISTORY + left, HISTORY", "left, HISTORY"),
}

SLOW_BUGS = {  # slow: caught by the last samples, or by long ones
    "tiles start from zeros": ("inside, 0, HISTORY + BLOCK_T", "inside, HISTORY, HISTORY + BLOCK_T"),
    "tiles of the wrong sequence": ("+ middle <= number:", "+ middle < number:"),
    "null sequences not zeroed": ("ALIGNED), 0.0, mask", "ALIGNED), 1.0, mask"),
    "runs start from zeros": (
        "tl.load(of_earlier, mask=of_channel",
        "tl.load(of_earlier, mask=of_channel & (tile < 0)",
    ),
    "runs see the sequence before": ("(token >= RUN) & (token < tokens + RUN)", "(token < tokens + RUN)"),
    "past of runs in the wrong column": ("tl.where(token + HISTORY == k,", "tl.where(token + HISTORY == k + 1,"),
    "entries of runs in another order": ("halves += (left, right)", "halves += (right, left)"),
}
