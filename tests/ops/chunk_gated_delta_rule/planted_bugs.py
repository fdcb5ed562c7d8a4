"""Bugs to plant in chunk_gated_delta_rule, and calls of it that are wrong."""

from tests.ops.tables import BadInput

BUGS = {
    "wrong group": ("head // (V_HEADS // K_HEADS)", "head % K_HEADS"),
    "not normalised": ("    if L2NORM:", "    if False:"),
    "system without beta": ("(of_key * much)[:, None]", "of_key[:, None]"),
    "inverse without beta": ("* much[None, :]", "* 1.0"),
    "what is between tokens not decayed": ("total[:, None] - total[None, :]", "0.0 * total[:, None]"),
    "last token of a part not solved": ("for j in range(_PART - 1):", "for j in range(_PART - 2):"),
    "state not decayed over a chunk": ("s * decay", "s"),
    "tokens not decayed to the chunk's end": ("tl.exp(left)", "1.0"),
    "what is known written again": ("new -= tl.dot(", "new -= 0.0 * tl.dot("),
    "token does not read itself": ("i[:, None] >= i[None, :]", "i[:, None] > i[None, :]"),
    "initial state not read": ("is_set(row, has_initial_state, initial_stride)", "(slot_stride < -1)"),
}

SLOW_BUGS = {  # slow: interpreted matrix products
    "parts below the diagonal dropped": ("n = tl.dot(whole, rest,", "n = 0.0 * tl.dot(whole, rest,"),
    "state before a chunk read as it is at its end": ("asking[None, :]", "1.0"),
    "state read by rows that have none": (
        "is_set(row, has_initial_state, initial_stride)",
        "(slot_stride >= 0)",
    ),
    "second chunk read as the first": ("solved += V_HEADS * CHUNK * CHUNK", "solved += 0"),
    "corner of the inverse wrong": ("whole += tl.dot(square,", "whole += 0.0 * tl.dot(square,"),
    "scale dropped": ("_factor(queries, L2NORM) * scale", "_factor(queries, L2NORM)"),
    "null rows not zeroed": ("tl.zeros([CHUNK, BLOCK], tl.float32), (t", "1.0, (t"),
    "null slot ignored": ("slots_stride, null_slot)", "slots_stride, -1)"),
    "write slots ignored": ("count, write_slots, write_stride", "count, None, write_stride"),
    "null destination written": ("write_stride, null_slot)", "write_stride, -1)"),
    "empty row's state not copied": ("stored &= slot_stride >= 0", "stored &= (slot_stride >= 0) & (count > 0)"),
    "empty row's state reset": ("source, count, write_slots", "source, count + 1, write_slots"),
}

BAD_INPUT: list[BadInput] = [
    (
        "base",
        "v",
        lambda v: v[0],
        r"v: got shape \(75, 4, 24\), expected \(n, length, v_heads, v_dim\); packed tokens come",
    ),
    (
        "packed, null rows",
        "v",
        lambda v: v[None],
        r"v: got shape \(1, 153, 4, 24\), expected \(tokens, v_heads, v_dim\); with cu_seqlens",
    ),
    ("base", "v", lambda v: v.int(), "v: got int32, expected float16"),
    ("base", "v", lambda v: v[..., :0], r"v: got shape \(3, 75, 4, 0\), expected only tokens of size 0"),
    ("base", "q", lambda q: q[0], r"q: got shape \(75, 2, 16\), expected \(..., k_heads, k_dim\), with the tokens"),
    ("base", "q", lambda q: q[..., :0], r"q: got shape \(3, 75, 2, 0\), expected only tokens of size 0"),
    ("base", "q", lambda q: q.long(), "q: got int64, expected float16"),
    ("base", "q", lambda q: q[:2], r"q: got shape \(2, 75, 2, 16\), expected \(3, 75, 2, 16\); tokens are those of v"),
    ("base", "k", lambda k: k[..., :8], r"k: got shape \(3, 75, 2, 8\), expected \(3, 75, 2, 16\); k is like q"),
    ("base", "v", lambda v: v[:, :, :3], "q: got 2 heads, expected a divisor of the 3 heads of v"),
    ("base", "g", lambda g: g[..., :2], r"g: got shape \(3, 75, 2\), expected \(3, 75, 4\); one number a token"),
    ("base", "g", lambda g: g.int(), "g: got int32, expected float16"),
    ("base", "beta", lambda b: b[:, 1:], r"beta: got shape \(3, 74, 4\), expected \(3, 75, 4\); one number a token"),
    ("packed, null rows", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape \(1, 4\), expected \(n \+ 1,\)"),
    ("packed, null rows", "cu_seqlens", lambda c: c.float(), "cu_seqlens: got float32, expected int32 or int64"),
    (
        "base",
        "ssm_state",
        lambda s: s[0],
        r"ssm_state: got shape \(4, 24, 16\), expected \(4, 4, 24, 16\); \(slots, v_heads, v_dim, k_dim\)",
    ),
    ("base", "ssm_state", lambda s: s.mT, r"ssm_state: got shape \(9, 4, 16, 24\), expected \(9, 4, 24, 16\)"),
    ("base", "ssm_state", lambda s: s.int(), "ssm_state: got int32, expected float16"),
    ("base", "ssm_state", lambda s: None, "ssm_state: got none, expected a cache; has_initial_state says who reads it"),
    (
        "not normalised, no slots",
        "ssm_state",
        lambda s: s[:1],
        "ssm_state: got 1 slots, expected at least 2; without slots, row i uses slot i",
    ),
    ("base", "slots", lambda s: s.float(), "slots: got float32, expected int32 or int64"),
    ("base", "slots", lambda s: s[:2], "slots: got 2 rows, expected at least 3"),
    ("base", "slots", lambda s: s.view(3, 1, 1), r"slots: got shape \(3, 1, 1\), expected \(rows,\) or"),
    ("packed, write slots", "write_slots", lambda s: s[:1], "write_slots: got 1 rows, expected at least 3"),
    ("base", "has_initial_state", lambda h: h.int(), "has_initial_state: got int32, expected bool"),
    ("base", "has_initial_state", lambda h: h[:2], r"has_initial_state: got shape \(2,\), expected \(3,\)"),
    ("base", "out", lambda o: o[..., :1], r"out: got shape \(3, 75, 4, 1\), expected \(3, 75, 4, 24\); out is like v"),
    ("base", "out", lambda o: o.int(), "out: got int32, expected float16"),
]
