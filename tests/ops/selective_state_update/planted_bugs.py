"""Bugs to plant in selective_state_update, and calls of it that are wrong."""

import torch

from tests.conftest import ACCELERATOR
from tests.ops.tables import BadInput

BUGS = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("        if SOFTPLUS:", "        if True:"),
    "bias dropped": ("            d += bias", "            d += 0 * bias"),
    "D dropped": ("y += u * skip", "y += 0 * u * skip"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
    "decay with the wrong sign": ("tl.exp(a * d)", "tl.exp(-a * d)"),
    "output from the old state": ("tl.sum(s * c[None, :]", "tl.sum((s - (b[None, :] * d) * u[:, None]) * c[None, :]"),
    "state not written": ("    if num_accepted_tokens is None:\n        if", "    if False:\n        if"),
    "write slots ignored": ("        if write_slots is None:", "        if True:"),
    "null destination written": ("if (target >= 0) & (target != null_slot):", "if target >= 0:"),
    "null rows not zeroed": ("tl.zeros([BLOCK], tl.float32)", "tl.full([BLOCK], 1.0, tl.float32)"),
    "null slot ignored": ("slots_stride, null_slot)", "slots_stride, -1)"),
    "accepted column off by one": ("slots_columns) - 1", "slots_columns - 1)"),
    "state rounded between tokens": ("u[:, None]\n", "u[:, None]\n        s = s.to(tl.bfloat16).to(tl.float32)\n"),
    "first token only": ("    for t in range(tokens):\n        token", "    for t in range(1):\n        token"),
}

ROUNDING_BUGS = {
    "rounded to the nearest": ("s = _rounded(", "_rounded("),
    "every number has the first word": (
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r0), tl.join(r0, r0))",
    ),
    "words in another order": (
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r1), tl.join(r2, r3))",
    ),
    "the row's words": ("rounding_seed, target,", "rounding_seed, row,"),
    "the source's words": ("rounding_seed, target,", "rounding_seed, source,"),
    "one channel's words": ("channel[:, None].to(tl.uint32)", "(0 * channel)[:, None].to(tl.uint32)"),
    "the head forgotten": ("source, of_x, WIDTH", "source, channel, WIDTH"),
    "rounds ignored": ("            ROUNDS,\n        )", "            10,\n        )"),
    "biased towards zero": ("(r >> 8)", "(r >> 9)"),
    "subnormals like the others": ("tl.maximum(exponent, 113)", "tl.maximum(exponent, 10)"),
    "the sign forgotten": ("| (bits & 0x80000000)", ""),
}
"""Bugs of stochastic rounding: an error budget lets any neighbour pass, so tests/test_rounding.py catches these."""

BAD_INPUT: list[BadInput] = [
    ("base", "ssm_state", lambda s: s[0, 0], r"ssm_state: got shape \(16, 16\), expected \(slots, dim, dstate\) or"),
    ("base", "ssm_state", lambda s: s.int(), "ssm_state: got int32, expected float16"),
    ("base", "ssm_state", lambda s: s[:, :3], r"x: got shape"),
    ("no slots", "ssm_state", lambda s: s[:1], "ssm_state: got 1 slots, expected at least"),
    ("base", "x", lambda x: x[0], r"x: got shape \(4, 16\), expected"),
    ("base", "x", lambda x: x.bool(), "x: got bool, expected float16"),
    ("base", "dt", lambda d: d[:, :2], r"dt: got shape"),
    ("base", "dt", lambda d: d.long(), "dt: got int64"),
    ("base", "A", lambda a: a[:3], r"A: got shape \(3,\), expected \(4, 16, 16\) or \(4,\)"),
    ("base", "B", lambda b: b[..., :8], r"B: got shape"),
    ("one group", "B", lambda b: b.repeat(1, 3, 1), r"C: got shape \(3, 1, 16\), expected \(3, 3, 16\); C is like B"),
    ("base", "C", lambda c: c[:1], r"C: got shape"),
    ("base", "D", lambda d: d[:2], r"D: got shape \(2,\), expected \(4, 16\) or \(4,\)"),
    ("base", "dt_bias", lambda d: d[:2], r"dt_bias: got shape \(2,\), expected \(4, 16\) or \(4,\)"),
    ("gate", "z", lambda z: z[:1], "z: got shape"),
    ("base", "slots", lambda s: s.double(), "slots: got float64, expected int32 or int64"),
    ("base", "slots", lambda s: s[:1], "slots: got 1 rows, expected at least"),
    ("write slots", "write_slots", lambda s: s[:1], "write_slots: got 1 rows, expected at least"),
    ("packed", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape .* expected \(n \+ 1,\)"),
    ("speculative", "num_accepted_tokens", lambda a: a[:1], r"num_accepted_tokens: got shape \(1,\)"),
    ("speculative", "slots", lambda s: None, "slots: got None"),
    ("base", "out", lambda o: o[..., :1], r"out: got shape"),
    (
        "base",
        "rounding_seed",
        lambda _: torch.zeros(1, dtype=torch.int32, device=ACCELERATOR),
        "rounding_seed: got int32, expected int64",
    ),
    (
        "base",
        "philox_rounds",
        lambda _: -7,
        "philox_rounds: got -7, expected at least 1, or 0 for 10",
    ),
    (
        "stochastic rounding",
        "rounding_seed",
        lambda s: s.repeat(2),
        r"rounding_seed: got shape \(2,\), expected \(1,\) or",
    ),
    (
        "stochastic rounding",
        "ssm_state",
        lambda s: s.bfloat16(),
        "ssm_state: got bfloat16, expected float16; rounding_seed asks",
    ),
]
