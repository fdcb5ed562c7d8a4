"""Bugs to plant in mamba_mixing, and calls of it that are wrong; those of plans are in mamba2_mixing's."""

from tests.ops.tables import BadInput

BUGS = {
    "prefills in the slots of decodes": ("first[decodes:rows]", "first[:prefills]"),
    "prefills read decodes' tokens": ("slice(decode_tokens, total)", "slice(0, prefill_tokens)"),
    "initial states of the decodes": ("plan.has_initial_state[decodes:rows]", "plan.has_initial_state[:prefills]"),
    "accepted tokens ignored": ('options["num_accepted_tokens"] = plan.num_accepted_tokens[:decodes]', "pass"),
    "padding not zeroed": ("batch.clear_rest(output)", "pass"),
    "x and gate swapped": ("x, z = projected.split", "z, x = projected.split"),
    "B and C swapped": ("parts = dt, B, C = low", "parts = dt, C, B = low"),
    "norms left out": ("part.copy_(", "("),
    "norm after the projection of dt": (
        "    torch.mm(dt, dt_proj_weight.t(), out=delta)\n    scan(*(op.call_undispatched for op in scans))",
        "    scan(*(op.call_undispatched for op in scans))\n    torch.mm(dt, dt_proj_weight.t(), out=delta)",
    ),
    "another eps": ("rms_norm(part, weight, norm_eps)", "rms_norm(part, weight, 1e-6)"),
    "prefills' bias dropped": ('"delta_bias": dt_proj_bias, ', ""),
    "decodes' bias dropped": ('"dt_bias": dt_proj_bias, ', ""),
    "prefills' D dropped": ('{"D": D, "z": prefills.of(z), "delta_bias"', '{"z": prefills.of(z), "delta_bias"'),
    "decodes' gate dropped": ('{"D": D, "z": decodes.of(z), "dt_bias"', '{"D": D, "dt_bias"'),
    "convolution's bias dropped": ("conv_weight, conv_bias", "conv_weight, None"),
}

BAD_INPUT: list[BadInput] = [
    ("base", "A", lambda A: A[:, :0], r"A: got shape \(24, 0\), expected \(inner, dstate\), neither of them 0"),
    ("base", "A", lambda a: a[0], r"A: got shape \(8,\), expected \(inner, dstate\)"),
    ("base", "dt_proj_weight", lambda w: w[0], r"dt_proj_weight: got shape \(5,\), expected \(inner, dt_rank\)"),
    ("base", "dt_proj_weight", lambda w: w[1:], r"dt_proj_weight: got shape \(23, 5\), expected \(24, 5\)"),
    ("base", "projected", lambda p: p[None], r"projected: got shape \(1, 25, 48\), expected \(tokens, size\)"),
    (
        "base",
        "projected",
        lambda p: p[:, 1:],
        r"projected: got shape \(25, 47\), expected \(25, 48\); x and gate of 24 channels",
    ),
    ("base", "projected", lambda p: p.int(), "projected: got int32, expected float16"),
    (
        "base",
        "x_proj_weight",
        lambda w: w[1:],
        r"x_proj_weight: got shape \(20, 24\), expected \(21, 24\); to dt, B and C",
    ),
    (
        "base",
        "x_proj_weight",
        lambda w: w.double(),
        "x_proj_weight: got float64, expected bfloat16, as projected; convert it once, beforehand",
    ),
    (
        "base",
        "dt_proj_weight",
        lambda w: w.double(),
        "dt_proj_weight: got float64, expected bfloat16, as projected; convert it once, beforehand",
    ),
    ("base", "dt_proj_bias", lambda b: b[1:], r"dt_proj_bias: got shape \(23,\), expected \(24,\)"),
    ("base", "D", lambda d: d[None], r"D: got shape \(1, 24\), expected \(24,\)"),
    ("prefills", "dt_norm_weight", lambda w: w[1:], r"dt_norm_weight: got shape \(6,\), expected \(7,\)"),
    ("prefills", "B_norm_weight", lambda w: w[1:], r"B_norm_weight: got shape \(15,\), expected \(16,\)"),
    ("prefills", "C_norm_weight", lambda w: w.long(), "C_norm_weight: got int64, expected float16"),
    ("base", "conv_state", lambda s: s[..., 1:], "conv_state: got state_len 2, expected at least 3"),
    (
        "base",
        "ssm_state",
        lambda s: s[:4],
        r"ssm_state: got shape \(4, 24, 8\), expected \(9, 24, 8\); both caches have as",
    ),
    (
        "speculative",
        "conv_state",
        lambda s: s[..., 2:],
        "conv_state: got state_len 3, expected at least 5; a speculative decode goes back by up to 2 tokens",
    ),
    ("base", "counts", lambda c: c.int(), "counts: got int32, expected int64"),
    ("base", "slots", lambda s: None, "slots: got None with counts, expected a whole plan, or none"),
    ("base", "out", lambda o: o[:, 1:], r"out: got shape \(25, 23\), expected \(25, 24\)"),
]
