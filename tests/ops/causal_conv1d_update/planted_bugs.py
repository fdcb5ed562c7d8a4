"""Bugs to plant in causal_conv1d_update."""

BUGS = {
    "window off by one": ("tl.maximum(oldest, 0)", "tl.maximum(oldest + 1, 0)"),
    "taps reversed": ("window[OLDER + k] * taps[k]", "window[OLDER + WIDTH - 1 - k] * taps[k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("        if SILU:", "        if True:"),
    "silu inverted": ("acc *= tl.sigmoid(acc)", "acc *= tl.sigmoid(-acc)"),
    "state not written": ("    if accepted_ptr is None:\n        for k", "    if False:\n        for k"),
    "state shifted by one token only": (
        "window = window[1:]",
        "window = window[1:] if length is None else window[:-1]",
    ),
    "null rows not zeroed": ("output_channel), 0.0, mask=inside)", "output_channel), 1.0, mask=inside)"),
    "null slot ignored": ("slots_stride, null_slot, slot_count)", "slots_stride, -1, slot_count)"),
    "old columns kept when speculating": ("tl.static_range(1, HISTORY)", "tl.static_range(2, HISTORY)"),
    "newest last: window from the oldest": ("window[OLDER + k]", "window[k]"),
    "newest last: older columns stay": ("STATE_LEN if NEWEST_LAST else WIDTH - 1", "WIDTH - 1"),
    "packed rows taken for single tokens": ("x_ptr += first * x_row", "x_ptr += row * x_row"),
}

CPP_BUGS = {
    "taps in reverse": ("taps[j] * some", "taps[width - 1 - j] * some"),
    "silu always": ("if (is_silu)", "if (true)"),
    "bias dropped": ("if (bias) {", "if (false) {"),
    "state not written": ("k < kept; k++)", "k < kept - 1; k++)"),
    "window from the first column": ("if (accepted) from =", "if (false) from ="),
    "newest last: window from the oldest": ("(t + older + j)", "(t + j)"),
    "newest last: older columns stay": ("newest_last ? state_len : width - 1", "width - 1"),
    "accepted windows moved too far": ("kept_from = accepted ? 1 : length", "kept_from = length"),
    "null rows not zeroed": ("room.begin() + LANES, 0.0f)", "room.begin() + LANES, 1.0f)"),
    "null slot ignored": ("Slots{slots, null, count}", "Slots{slots, -1, count}"),
    "packed rows from the start": ("begin = rows.begin(row);", "begin = 0;"),
    "output before all is read": ("t < length; t++) {\n      Floats y", "t < length - 1; t++) {\n      Floats y"),
}
