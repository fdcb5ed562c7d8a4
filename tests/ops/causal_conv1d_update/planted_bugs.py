"""Bugs to plant in causal_conv1d_update, and calls of it that are wrong."""

from tests.ops.tables import BadInput

BUGS = {
    "window off by one": ("tl.maximum(oldest, 0)", "tl.maximum(oldest + 1, 0)"),
    "taps reversed": ("acc += window[k] * taps[k]", "acc += window[WIDTH - 1 - k] * taps[k]"),
    "bias dropped": ("acc = bias\n", "acc = bias * 0\n"),
    "silu always": ("        if SILU:", "        if True:"),
    "silu inverted": ("acc *= tl.sigmoid(acc)", "acc *= tl.sigmoid(-acc)"),
    "state not written": ("    if accepted_ptr is None:\n        for k", "    if False:\n        for k"),
    "state shifted by one token only": (
        "window = window[1:]",
        "window = window[1:] if length is None else window[:-1]",
    ),
    "null rows not zeroed": ("output_channel), 0.0, mask=inside)", "output_channel), 1.0, mask=inside)"),
    "null slot ignored": ("slots_stride, null_slot)", "slots_stride, -1)"),
    "old columns kept when speculating": ("tl.static_range(1, HISTORY)", "tl.static_range(2, HISTORY)"),
    "packed rows taken for single tokens": ("x_ptr += first * x_row", "x_ptr += row * x_row"),
}

BAD_INPUT: list[BadInput] = [
    ("base", "x", lambda x: x[0], r"x: got shape \(24,\), expected \(n, dim\) or \(n, length, dim\)"),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16, bfloat16, float32 or float64"),
    (
        "base",
        "x",
        lambda x: x[:, :20],
        r"weight: got shape \(24, 4\), expected \(20, 4\); its dim is the last axis of x",
    ),
    ("packed", "x", lambda x: x[None], r"x: got shape \(1, 10, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "conv_state", lambda s: s[0], r"conv_state: got shape \(24, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :12], r"conv_state: got shape \(6, 12, 3\), expected \(6, 24, 3\)"),
    ("base", "conv_state", lambda s: s[..., :2], "conv_state: got state_len 2, expected at least 3"),
    ("base", "conv_state", lambda s: s.long(), "conv_state: got int64, expected float16"),
    ("no slots", "conv_state", lambda s: s[:2], "conv_state: got 2 slots, expected at least 4; without slots row i"),
    ("base", "weight", lambda w: w.unsqueeze(1), r"weight: got shape \(24, 1, 4\), expected \(dim, width\); squeeze"),
    ("base", "weight", lambda w: w[:, :1], "weight: got width 1, expected a width of 2 to 8"),
    ("base", "weight", lambda w: w.repeat(1, 3), "weight: got width 12, expected a width of 2 to 8"),
    ("base", "bias", lambda b: b[:4], r"bias: got shape \(4,\), expected \(24,\)"),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 4; give every row a slot"),
    (
        "base",
        "slots",
        lambda s: s[None, None],
        r"slots: got shape \(1, 1, 4\), expected \(rows,\) or \(rows, columns\)",
    ),
    ("packed", "cu_seqlens", lambda c: c[:0], r"cu_seqlens: got shape \(0,\), expected \(n \+ 1,\)"),
    ("packed", "cu_seqlens", lambda c: c.half(), "cu_seqlens: got float16, expected int32 or int64"),
    ("speculative", "num_accepted_tokens", lambda a: a[:3], r"num_accepted_tokens: got shape \(3,\), expected \(4,\)"),
    (
        "speculative",
        "num_accepted_tokens",
        lambda a: a.bool(),
        "num_accepted_tokens: got bool, expected int32 or int64",
    ),
    ("speculative", "conv_state", lambda s: s[..., :4], "conv_state: got state_len 4, expected at least 5"),
    ("base", "out", lambda o: o[:2], r"out: got shape \(2, 24\), expected \(4, 24\)"),
]
