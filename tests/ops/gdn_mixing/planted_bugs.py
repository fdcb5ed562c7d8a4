"""Bugs to plant in gdn_mixing, and calls of it that are wrong; those of plans are in mamba2_mixing's."""

from tests.ops.tables import BadInput

BUGS = {
    "prefills in the slots of decodes": ("first[decodes:rows]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens, total)", "slice(0, prefill_tokens)"),
    "initial states of the decodes": ("plan.has_initial_state[decodes:rows]", "plan.has_initial_state[:prefills]"),
    "accepted tokens ignored": ('options["num_accepted_tokens"] = plan.num_accepted_tokens[:decodes]', "pass"),
    "null slot ignored": ('"null_slot": null_slot}', '"null_slot": -1}'),
    "padding not zeroed": ("batch.clear_rest(output)", "pass"),
    "padding of the gate not zeroed": ("batch.clear_rest(z)", "pass"),
    "gate not written": ("z[here].copy_(gate)", "pass"),
    "a and b swapped": ("mixed, gate, b, a = unpack", "mixed, gate, a, b = unpack"),
    "q and k swapped": ("q, k, v = by_head", "k, q, v = by_head"),
    "flat whatever the layout": ("*sizes, interleaved)", "*sizes, False)"),
    "prefills not normalised": (
        "qk_l2norm=True, out=rows.of(output), **rows.options)\n\n    def step",
        "out=rows.of(output), **rows.options)\n\n    def step",
    ),
    "decodes' bias dropped": ('"dt_bias": dt_bias}', '"dt_bias": 0 * dt_bias}'),
    "convolution's bias dropped": ("conv_weight, conv_bias", "conv_weight, None"),
}

BAD_INPUT: list[BadInput] = [
    ("base", "num_k_heads", lambda h: 0, "num_k_heads: got 0, expected a positive number"),
    ("base", "head_v_dim", lambda d: -1, "head_v_dim: got -1, expected a positive number"),
    ("base", "num_v_heads", lambda h: 3, "num_v_heads: got 3, expected a multiple of the 2 heads of k"),
    (
        "base",
        "projected_qkvz",
        lambda p: p[None],
        r"projected_qkvz: got shape \(1, 25, 128\), expected \(tokens, size\)",
    ),
    (
        "base",
        "projected_qkvz",
        lambda p: p[:, 1:],
        r"projected_qkvz: got shape \(25, 127\), expected \(25, 128\); q and k of 2 heads of 8, v and gate of 4",
    ),
    ("base", "projected_qkvz", lambda p: p.int(), "projected_qkvz: got int32, expected float16"),
    (
        "base",
        "projected_ba",
        lambda p: p[:, 1:],
        r"projected_ba: got shape \(25, 7\), expected \(25, 8\); b and a of every head of v",
    ),
    ("base", "conv_state", lambda s: s[:, :8], r"conv_state: got shape \(9, 8, 3\), expected \(9, 80, 3\)"),
    ("base", "conv_state", lambda s: s[..., 1:], "conv_state: got state_len 2, expected at least 3"),
    (
        "base",
        "ssm_state",
        lambda s: s.mT,
        r"ssm_state: got shape \(9, 4, 8, 12\), expected \(9, 4, 12, 8\); both caches",
    ),
    ("base", "conv_weight", lambda w: w[:, :1], "conv_weight: got width 1, expected a width of 2 to 8"),
    ("prefills", "conv_bias", lambda b: b[1:], r"conv_bias: got shape \(159,\), expected \(160,\)"),
    ("base", "A_log", lambda a: a[:, None], r"A_log: got shape \(4, 1\), expected \(4,\)"),
    ("base", "dt_bias", lambda a: a[1:], r"dt_bias: got shape \(3,\), expected \(4,\)"),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "conv_state: got state_len 3, expected at least 5; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "counts", lambda c: c.int(), "counts: got int32, expected int64"),
    ("base", "slots", lambda s: None, "slots: got None with counts, expected a whole plan, or none"),
    ("decodes", "z", lambda z: z[1:], r"z: got shape \(4, 4, 12\), expected \(5, 4, 12\)"),
    ("base", "out", lambda o: o.flatten(1), r"out: got shape \(25, 48\), expected \(25, 4, 12\)"),
]
