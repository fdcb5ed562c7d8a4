"""Bugs to plant in mamba_chunk_scan, and calls of it that are wrong."""

from tests.ops.tables import BadInput

BUGS = {
    "wrong group": ("head // (HEADS // GROUPS)", "head % GROUPS"),
    "softplus always": ("    if SOFTPLUS:", "    if True:"),
    "dt not limited": ("tl.minimum(tl.maximum(d, dt_min), dt_max)", "d"),
    "tokens not decayed to the chunk's end": ("reverse=True) - log_decay) * d", "reverse=True) * 0.0) * d"),
    "state not decayed over a chunk": ("s *= tl.exp2(tl.load(decay + high - 1))", "s *= 1.0"),
    "token does not read itself": ("token[:, None] >= t[None, :]", "token[:, None] > t[None, :]"),
    "state before the chunk not read": ("    if past > 0:", "    if past > 1:"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "initial state not read": ("past |= is_set(", "past |= 0 * is_set("),
    "chunks do not end at absolute positions": ("before = tl.load", "before = 0 * tl.load"),
    "null rows not zeroed": ("tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32), written", "1.0, written"),
    "bias dropped": ("d += tl.load(dt_bias", "d += 0.0 * tl.load(dt_bias"),
    "start of a long chunk dropped": ("range(begin, tl.minimum(", "range(first, tl.minimum("),
    "state of the chunk before last": ("(number - 1).to(tl.int64) * kept_stride", "number.to(tl.int64) * kept_stride"),
    "last chunk's state not kept": (
        "        if chunk_states is not None:\n            tl.store(",
        "        if 0:\n            tl.store(",
    ),
    "null slot ignored": (
        "source = slot_of(row, slots, slots_stride, null_slot)",
        "source = slot_of(row, slots, slots_stride, -1)",
    ),
    "null destination written": ("write_stride, null_slot)", "write_stride, -1)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, None, write_stride"),
    "empty row resets its state": ("source, count, write_slots", "source, count + 1, write_slots"),
    "D dropped": ("y += u * tl.load(D + head)", "y += 0.0 * u * tl.load(D + head)"),
    "gate without sigmoid": ("y *= gate * tl.sigmoid(gate)", "y *= gate"),
}

BAD_INPUT: list[BadInput] = [
    (
        "base",
        "x",
        lambda x: x[0],
        r"x: got shape \(20, 4, 16\), expected \(n, length, heads, dim\); packed tokens come",
    ),
    (
        "packed",
        "x",
        lambda x: x[None],
        r"x: got shape \(1, 43, 4, 16\), expected \(tokens, heads, dim\); with cu_seqlens",
    ),
    ("base", "x", lambda x: x.int(), "x: got int32, expected float16"),
    ("base", "x", lambda x: x[..., :0], r"x: got shape \(3, 20, 4, 0\), expected only tokens of size 0"),
    ("base", "dt", lambda d: d[..., :2], r"dt: got shape \(3, 20, 2\), expected \(3, 20, 4\); one step size"),
    ("base", "A", lambda a: a[:3], r"A: got shape \(3,\), expected \(4,\)"),
    ("base", "A", lambda a: a.long(), "A: got int64, expected float16"),
    ("base", "B", lambda b: b[0], r"B: got shape \(20, 2, 16\), expected like x"),
    (
        "base",
        "B",
        lambda b: b[:, :9],
        r"B: got shape \(3, 9, 2, 16\), expected \(3, 20, 2, 16\); tokens are those of x",
    ),
    ("base", "C", lambda c: c[..., :8], r"C: got shape \(3, 20, 2, 8\), expected \(3, 20, 2, 16\); C is like B"),
    ("base", "chunk_size", lambda _: 0, "chunk_size: got 0, expected a positive number of tokens"),
    ("dt limits", "dt_max", lambda _: 0.125, "dt_min: got 0.25, expected at most dt_max, which is 0.125"),
    ("base", "D", lambda d: d[:2], r"D: got shape \(2,\), expected \(4,\) or \(4, 16\)"),
    ("gate", "z", lambda z: z[:1], r"z: got shape \(1, 20, 4, 16\), expected \(3, 20, 4, 16\); z is like x"),
    ("base", "dt_bias", lambda d: d[:2], r"dt_bias: got shape \(2,\), expected \(4,\)"),
    ("packed", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape \(1, 4\), expected \(n \+ 1,\)"),
    (
        "absolute chunks",
        "num_computed_tokens",
        lambda c: c[:2],
        r"num_computed_tokens: got shape \(2,\), expected \(3,\)",
    ),
    (
        "absolute chunks",
        "num_computed_tokens",
        lambda c: c.bool(),
        "num_computed_tokens: got bool, expected int32 or int64",
    ),
    (
        "base",
        "ssm_state",
        lambda s: s[0],
        r"ssm_state: got shape \(4, 16, 16\), expected \(4, 4, 16, 16\); \(slots, heads",
    ),
    ("base", "ssm_state", lambda s: s[:, :3], r"ssm_state: got shape \(8, 3, 16, 16\), expected \(8, 4, 16, 16\)"),
    ("base", "ssm_state", lambda s: s.int(), "ssm_state: got int32, expected float16"),
    (
        "no slots",
        "ssm_state",
        lambda s: s[:2],
        "ssm_state: got 2 slots, expected at least 3; without slots, row i uses",
    ),
    ("initial states", "ssm_state", lambda s: None, "ssm_state: got none, expected a cache; has_initial_state says"),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 3"),
    ("write slots", "write_slots", lambda s: s[:1], "write_slots: got 1 rows, expected at least 3"),
    ("initial states", "has_initial_state", lambda h: h.int(), "has_initial_state: got int32, expected bool"),
    ("initial states", "has_initial_state", lambda h: h[:2], r"has_initial_state: got shape \(2,\), expected \(3,\)"),
    ("chunk states", "chunk_states", lambda c: c[:9], "chunk_states: got 9 chunks, expected at least 10; as many"),
    (
        "chunk states",
        "chunk_states",
        lambda c: c[:, 1:],
        r"chunk_states: got shape \(10, 3, 16, 16\), expected \(10, 4",
    ),
    ("base", "out", lambda o: o[..., :1], r"out: got shape \(3, 20, 4, 1\), expected \(3, 20, 4, 16\); out is like x"),
]
