"""Bugs to plant in mamba2_mixing, and calls of it that are wrong."""

import torch

from tests.ops.tables import BadInput

BUGS = {
    "prefills in the slots of decodes": ("first[decodes:rows]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens, total)", "slice(0, prefill_tokens)"),
    "prefills' tokens counted from the first decode": ("plan.prefill_cu_seqlens[:", "plan.cu_seqlens[:"),
    "initial states of the decodes": ("plan.has_initial_state[decodes:rows]", "plan.has_initial_state[:prefills]"),
    "accepted tokens ignored": ('options["num_accepted_tokens"] = plan.num_accepted_tokens[:decodes]', "pass"),
    "one column when speculating": ('options["slots"] = plan.slots[:decodes]', "pass"),
    "null slot ignored": ('"null_slot": null_slot}', '"null_slot": -1}'),
    "padding not zeroed": ("batch.clear_rest(output)", "pass"),
    "B and C swapped": ("x, B, C = by_head", "x, C, B = by_head"),
    "prefills' bias dropped": (
        "D=D,\n            dt_bias=dt_bias,\n            dt_softplus=True",
        "D=D,\n            dt_softplus=True",
    ),
    "decodes' bias dropped": ("dt_bias=None if limited else bias", "dt_bias=None"),
    "decodes' limits ignored": (".clamp(dt_min, dt_max)", ""),
    "prefills' limits ignored": ("dt_min=dt_min,\n            dt_max=dt_max,", ""),
    "convolution's bias dropped": ("conv_weight, conv_bias", "conv_weight, None"),
}

BAD_INPUT: list[BadInput] = [
    ("base", "dt_max", lambda m: -1.0, "dt_min: got 0.0, expected at most dt_max, which is -1.0"),
    ("base", "heads", lambda h: 0, "heads: got 0, expected a positive number"),
    ("base", "chunk_size", lambda c: -1, "chunk_size: got -1, expected a positive number"),
    ("base", "groups", lambda g: 3, "groups: got 3, expected a divisor of the 4 heads"),
    ("base", "projected", lambda p: p[None], r"projected: got shape \(1, 25, 132\), expected \(tokens, size\)"),
    (
        "base",
        "projected",
        lambda p: p[:, :-1],
        r"projected: got shape \(25, 131\), expected \(25, 132\); gate, x, B, C and dt",
    ),
    ("base", "projected", lambda p: p.int(), "projected: got int32, expected float16"),
    ("base", "conv_state", lambda s: s[0], r"conv_state: got shape \(96, 3\), expected \(slots, dim, state_len\)"),
    ("base", "conv_state", lambda s: s[:, :8], r"conv_state: got shape \(9, 8, 3\), expected \(9, 96, 3\)"),
    ("base", "conv_state", lambda s: s[..., 1:], "conv_state: got state_len 2, expected at least 3"),
    (
        "base",
        "ssm_state",
        lambda s: s[:4],
        r"ssm_state: got shape \(4, 4, 8, 16\), expected \(9, 4, 8, 16\); both caches have as",
    ),
    ("base", "ssm_state", lambda s: s.long(), "ssm_state: got int64, expected float16"),
    ("base", "conv_weight", lambda w: w[0], r"conv_weight: got shape \(4,\), expected \(dim, width\)"),
    ("base", "conv_weight", lambda w: w[:, :1], "conv_weight: got width 1, expected a width of 2 to 8"),
    ("base", "conv_bias", lambda b: b[1:], r"conv_bias: got shape \(95,\), expected \(96,\)"),
    ("base", "A", lambda a: a[:, None], r"A: got shape \(4, 1\), expected \(4,\)"),
    ("base", "dt_bias", lambda a: a[1:], r"dt_bias: got shape \(3,\), expected \(4,\)"),
    ("base", "counts", lambda c: None, "cu_seqlens: got a tensor without counts, expected a whole plan, or none"),
    ("base", "slots", lambda s: None, "slots: got None with counts, expected a whole plan, or none"),
    ("base", "counts", lambda c: c[1:], r"counts: got shape \(3,\), expected \(4,\); decodes, their tokens, prefills"),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "conv_state: got state_len 3, expected at least 5; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "counts", lambda c: c.int(), "counts: got int32, expected int64"),
    (
        "base",
        "counts",
        lambda c: torch.tensor([2, 2, 6, 23]),
        "counts: got 2 decodes and 6 prefills, expected at most 7 rows",
    ),
    (
        "base",
        "counts",
        lambda c: torch.tensor([2, 2, 3, 24]),
        "counts: got 26 tokens, expected at most 25; the plan is",
    ),
    (
        "base",
        "counts",
        lambda c: torch.tensor([2, 3, 3, 22]),
        "counts: got 3 tokens of 2 decodes, expected one each; decodes of",
    ),
    ("base", "cu_seqlens", lambda c: c[None], r"cu_seqlens: got shape \(1, 8\), expected \(n \+ 1,\)"),
    (
        "base",
        "prefill_cu_seqlens",
        lambda c: c[1:],
        r"prefill_cu_seqlens: got shape \(7,\), expected \(8,\); all tensors of a plan",
    ),
    ("base", "slots", lambda s: s[1:], "slots: got 6 rows, expected at least 7"),
    ("base", "has_initial_state", lambda h: h.int(), "has_initial_state: got int32, expected bool; convert it first"),
    (
        "base",
        "has_initial_state",
        lambda h: h[1:],
        r"has_initial_state: got shape \(6,\), expected \(7,\); all tensors",
    ),
    ("base", "num_computed_tokens", lambda c: c.float(), "num_computed_tokens: got float32, expected int32 or int64"),
    ("base", "out", lambda o: o.flatten(1), r"out: got shape \(25, 32\), expected \(25, 4, 8\)"),
]
