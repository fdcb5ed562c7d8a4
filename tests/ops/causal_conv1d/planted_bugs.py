"""Bugs to plant in causal_conv1d, and calls of it that are wrong."""

from tests.ops.tables import BadInput

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
    "state not moved by short sequences": ("state_ptr + place * state_column", "state_ptr + k * state_column"),
    "null slot ignored": ("slots_stride, null_slot)", "slots_stride, -1)"),
}

SLOW_BUGS = {  # slow: caught by the last samples, or by long ones
    "tiles start from zeros": ("(token >= 0)", "(token >= begin)"),
    "tiles of the wrong sequence": ("+ middle <= tile:", "+ middle < tile:"),
    "null sequences not zeroed": ("ALIGNED), 0.0, mask=live)", "ALIGNED), 1.0, mask=live)"),
}

BAD_INPUT: list[BadInput] = [
    (
        "base",
        "x",
        lambda x: x[0],
        r"x: got shape \(6, 24\), expected \(n, length, dim\); packed sequences need cu_seqlens",
    ),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16"),
    ("base", "x", lambda x: x[..., :20], r"weight: got shape \(24, 4\), expected \(20, 4\); its dim is the last axis"),
    ("packed", "x", lambda x: x[None], r"x: got shape \(1, 51, 24\), expected \(tokens, dim\); with cu_seqlens"),
    ("base", "weight", lambda w: w.unsqueeze(1), r"weight: got shape \(24, 1, 4\), expected \(dim, width\); squeeze"),
    ("base", "weight", lambda w: w[:, :1], "weight: got width 1, expected a width of 2 to 8"),
    ("base", "weight", lambda w: w.repeat(1, 3), "weight: got width 12, expected a width of 2 to 8"),
    ("base", "bias", lambda b: b[:4], r"bias: got shape \(4,\), expected \(24,\)"),
    ("packed", "cu_seqlens", lambda c: c[:0], r"cu_seqlens: got shape \(0,\), expected \(n \+ 1,\)"),
    ("packed", "cu_seqlens", lambda c: c.half(), "cu_seqlens: got float16, expected int32 or int64"),
    ("packed", "cu_seqlens", lambda c: None, r"x: got shape \(51, 24\), expected \(n, length, dim\)"),
    ("base", "conv_state", lambda s: s[0], r"conv_state: got shape \(24, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :12], r"conv_state: got shape \(6, 12, 3\), expected \(6, 24, 3\)"),
    ("base", "conv_state", lambda s: s[..., :2], "conv_state: got state_len 2, expected at least 3"),
    ("base", "conv_state", lambda s: s.long(), "conv_state: got int64, expected float16"),
    ("no slots", "conv_state", lambda s: s[:2], "conv_state: got 2 slots, expected at least 3; without slots sequence"),
    ("base", "conv_state", lambda s: None, "slots: got a tensor, expected None where there is no conv_state"),
    ("no slots", "conv_state", lambda s: None, "has_initial_state: got a tensor, expected None where there is no"),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 3; give every row a slot"),
    ("base", "has_initial_state", lambda k: k.int(), "has_initial_state: got int32, expected bool; compare it with 0"),
    ("base", "has_initial_state", lambda k: k[:2], r"has_initial_state: got shape \(2,\), expected \(3,\)"),
    ("base", "out", lambda o: o[:2], r"out: got shape \(2, 6, 24\), expected \(3, 6, 24\)"),
]
